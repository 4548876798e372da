"""Trains and prunes a model that two processes divide: tests run it twice at a time, with a folder and a rank.

Scenarios follow each other in the same two processes. What they find lies in one file of each at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightnings import Callback, LightningModule, ModelParallelStrategy, Trainer
from lit import Lit, digits, seeded, trainer
from quick import draw_nothing, time_latency_quickly
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, Subset
from two_plain import all_plain, held, network, whole

from lightning_prune import (
    LAMP,
    ActivationNorm,
    Blocks,
    Channels,
    Criterion,
    Cubic,
    Global,
    Gradient,
    Guard,
    Magnitude,
    OneShot,
    Oracle,
    ParticleFilter,
    PerLayer,
    PruningCallback,
    Random,
    Rewind,
    Selector,
    Taylor,
    Threshold,
)

EVERY_EPOCH = Cubic(start="1ep", end="3ep", every="1ep")
CLIP = 0.1


class Parts(Lit):
    """Divided among processes if there are several."""

    def __init__(self, optimizer: Any = lambda p: SGD(p, 0.05, momentum=0.9)) -> None:
        super().__init__(optimizer)
        self.net = network()
        self.sharded = False

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self.sharded:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


class ByHand(Parts):
    """Clips and steps itself, as a Trainer would."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()
        return loss


class Watch(Callback):
    """Keeps, of a run, the loss of every batch, and what is not 0 though it is masked."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.losses: list[float] = []
        self.wrong = 0
        self.masked = 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().clone()
        self.losses.append(float(trainer.strategy.reduce(loss)))
        parameters = dict(module.named_parameters())
        (optimizer,) = trainer.optimizers
        self.masked = 0
        for name, mask in self.pruning.masks.items():
            gone = ~held(mask)
            self.masked += int(gone.sum())
            self.wrong += int(held(parameters[name])[gone].count_nonzero())
            memory = optimizer.state[parameters[name]].get("momentum_buffer")
            assert memory is not None
            self.wrong += int(held(memory)[gone].count_nonzero())


class Before(Callback):
    """Stands before a PruningCallback: keeps what each epoch starts with, saves after the second epoch."""

    def __init__(self, pruning: PruningCallback, folder: Path | None) -> None:
        self.pruning = pruning
        self.folder = folder
        self.scores: list[dict[str, Tensor]] = []
        self.parameters: dict[str, Tensor] = {}
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.parameters = dict(module.named_parameters())  # not those brought together for validation

    def on_train_epoch_start(self, *_: Any) -> None:
        self.weights.append(whole(self.parameters))
        pruner = self.pruning._state.network.pruner
        self.scores.append(pruner.scores() if pruner.ready else {})

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.folder is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder)


class Keep(Callback):
    """Stands after a PruningCallback: keeps the masks of each epoch."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.masks: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.masks.append(whole(self.pruning.masks))


def joint(examples: int) -> DataLoader[Any]:
    """This process's part of batches of 64, in order."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return DataLoader(Subset(digits().dataset, range(rank, examples, size)), 64 // size)


def run(
    folder: Path,
    pruning: PruningCallback,
    save: Path | None = None,
    resume: Path | None = None,
    single: bool = False,
    make: type[Parts] = Parts,
) -> dict[str, Any]:
    """One fit of 4 epochs on the same joint batches, in however many processes; what was seen of it."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    parallel = ModelParallelStrategy(size, 1, save_distributed_checkpoint=not single) if size > 1 else "auto"
    before, watch, keep = Before(pruning, save), Watch(pruning), Keep(pruning)
    model = seeded(make)
    callbacks = (before, pruning, keep, watch)
    options: dict[str, Any] = {"num_sanity_val_steps": 1, "use_distributed_sampler": False}
    if model.automatic_optimization:
        options["gradient_clip_val"] = CLIP
    fitted = trainer(folder, *callbacks, strategy=parallel, devices=size, **options)
    fitted.fit(model, joint(320), joint(128), ckpt_path=resume)
    return {
        "weights before": before.weights,
        "scores": before.scores,
        "masks": keep.masks,
        "weights": whole(model.named_parameters()),
        "losses": watch.losses,
        "wrong": watch.wrong,
        "masked": watch.masked,
        "kept": {layer.name: layer.kept for layer in pruning.report.layers},
        "width": {layer.name: layer.width for layer in pruning.report.layers},
        "sparsity": [entry.sparsity for entry in pruning.report.history],
        "protected": pruning.report.protected,
        "left out": pruning.report.left_out,
        "kinds": {type(mask).__name__ for mask in pruning.masks.values()},
    }


def pruning(criterion: Criterion, selector: Selector) -> PruningCallback:
    return PruningCallback(0.6, criterion=criterion, selector=selector, schedule=EVERY_EPOCH)


class Break(Callback):
    """Stands before a PruningCallback: in one step, one process finds inf in its gradients."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            held(module.net[3].weight.grad)[0, 0] = torch.inf


class Heal(Callback):
    """Stands after it, and keeps how many steps it has counted."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.counts: list[set[int]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for parameter in module.parameters():
            held(parameter.grad).nan_to_num_(0, 0, 0)
        statistics = self.pruning._state.network.pruner.observations.statistics
        self.counts.append({int(each.count) for each in statistics.values()})


def broken(folder: Path) -> dict[str, Any]:
    """A run in which one process finds inf in a step."""
    callback = PruningCallback(0.5, criterion=Gradient(), schedule=OneShot("1ep"))
    heal = Heal(callback)
    strategy = ModelParallelStrategy(2, 1)
    fitted = trainer(folder, Break(), callback, heal, max_epochs=2, strategy=strategy, devices=2)
    fitted.fit(seeded(Parts), digits(32))
    return {"counts": heal.counts, "left out": callback.report.left_out}


FITS = {  # and whether its checkpoint is one file
    "magnitude": (Magnitude(), Global(), True),
    "taylor": (Taylor(), Global(), False),
    "gradient": (Gradient(), PerLayer(), True),
}
REFUSED: dict[str, Any] = {
    "Channels": lambda: PruningCallback(0.5, structure=Channels()),
    "macs": lambda: PruningCallback(0.5, selector=Global(budget="macs")),
    "params": lambda: PruningCallback(0.5, selector=Global(budget="params")),
    "most": lambda: PruningCallback(0.5, selector=Global(most=0.9)),
    "normalize": lambda: PruningCallback(0.5, selector=Global(normalize="l2")),
    "Blocks": lambda: PruningCallback(0.5, structure=Blocks(1, 1)),
    "Threshold": lambda: PruningCallback(selector=Threshold(value=0.1)),
    "ParticleFilter": lambda: PruningCallback(0.5, selector=ParticleFilter()),
    "LAMP": lambda: PruningCallback(0.5, criterion=LAMP()),
    "Random": lambda: PruningCallback(0.5, criterion=Random()),
    "ActivationNorm": lambda: PruningCallback(0.5, criterion=ActivationNorm()),
    "Oracle": lambda: PruningCallback(0.5, criterion=Oracle()),
    "Rewind": lambda: PruningCallback(0.5, rewind=Rewind()),
    "Guard": lambda: PruningCallback(0.5, guard=Guard("acc", "max", 0.1)),
    "compact": lambda: PruningCallback(0.5, compact=True),
}


class Columns(Parts):
    """Divided along the second dimension."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        shard = distribute_tensor(self.net[3].weight, mesh, [Shard(1)])
        self.net[3].weight = nn.Parameter(shard)


def refusal(folder: Path, callback: PruningCallback, model: LightningModule) -> tuple[str, int]:
    """What the error says, and after how many steps."""
    fitted = trainer(folder, callback, strategy=ModelParallelStrategy(2, 1), devices=2)
    try:
        fitted.fit(model, digits(32))
    except ValueError as error:
        return str(error), fitted.global_step
    return "", fitted.global_step


def all_fits(folder: Path) -> dict[str, Any]:
    """All of this page."""
    found: dict[str, Any] = {"broken": broken(folder)}
    for name, (criterion, selector, single) in FITS.items():
        path = folder / f"{name}.ckpt"
        found[name] = run(folder, pruning(criterion, selector), save=path, single=single)
        if criterion.sums:  # there is more to save than masks
            found[f"{name} resumed"] = run(folder, pruning(criterion, selector), resume=path, single=single)
    found["by hand"] = run(folder, pruning(*FITS["taylor"][:2]), make=ByHand)
    found["from one"] = run(folder, pruning(*FITS["taylor"][:2]), resume=folder / "one.ckpt")
    found["refused"] = {name: refusal(folder, make(), seeded(Parts)) for name, make in REFUSED.items()}
    found["columns"] = refusal(folder, PruningCallback(0.5), seeded(Columns))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_latency_quickly()
    draw_nothing()
    place, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=2)
    # FSDP2 of torch 2.6 does not run on the CPU
    fits = all_fits(place) if hasattr(torch.cpu.Stream, "record_event") else {}
    torch.save(all_plain() | fits, place / f"rank{rank}.pt")
    dist.destroy_process_group()
