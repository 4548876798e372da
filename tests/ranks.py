"""Fits in two processes, and what each process has in the end: a program that tests run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distilled import Explicit
from lightnings import Callback, Trainer, seed_everything
from lit import Lit, digits, fit, seeded, trainer
from quick import draw_nothing, time_latency_quickly
from resumable import ResumableLoader
from runs import EveryStep
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.utils.data import DataLoader, Subset

from lightning_prune import (
    ActivationTaylor,
    Channels,
    Cubic,
    Distillation,
    Gradient,
    Guard,
    LocalCriterion,
    NofM,
    OneShot,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    PerLayer,
    PruningCallback,
    Reconstruct,
    Rewind,
    Taylor,
    Wanda,
)

SCHEDULE = Cubic("3st", "9st", every="3st")
JOINT: dict[str, Callable[[], PruningCallback]] = {
    "weights": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE),
    "channels": lambda: PruningCallback(0.4, criterion=Taylor(), structure=Channels(), schedule=SCHEDULE),
    "pattern": lambda: PruningCallback(criterion=Gradient(), selector=NofM(2, 4), schedule=SCHEDULE),
    "activations": lambda: PruningCallback(0.8, criterion=Wanda(every=1), schedule=SCHEDULE),
    "losses": lambda: PruningCallback(
        0.4, criterion=OptimalBrainDamage(batches=2), structure=Channels(), schedule=SCHEDULE
    ),
    "reconstruction": lambda: PruningCallback(
        0.4,
        structure=Channels(),
        selector=PerLayer(),
        schedule=SCHEDULE,
        reconstruct=Reconstruct(batches=5),
    ),
    "sparsegpt": lambda: PruningCallback(
        criterion=OptimalBrainSurgeon(),
        selector=NofM(2, 4),
        schedule=SCHEDULE,
        reconstruct=Reconstruct(batches=5),
    ),
}
RESUMED = JOINT | {
    "rewind": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE, rewind=Rewind("1st")),
    "guard": lambda: PruningCallback(
        0.8, schedule=Cubic("1ep", "2ep"), guard=Guard("loss", "min", max_drop=0.5, patience=1)
    ),
}
LATER = OneShot("14st")
GATHERED: dict[str, Callable[[], PruningCallback]] = {  # and not used yet when the fit ends
    "gradients": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=LATER),
    "gradients of channels": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), schedule=LATER
    ),
    "inputs": lambda: PruningCallback(0.8, criterion=Wanda(every=1), schedule=LATER),
    "inputs and gradients": lambda: PruningCallback(
        0.4, criterion=ActivationTaylor(every=1), structure=Channels(), schedule=LATER
    ),
}


def cutting() -> PruningCallback:
    """Cuts the network at each event, for which DDP is made anew."""
    return PruningCallback(0.4, criterion=Taylor(), structure=Channels(), schedule=SCHEDULE, compact="each")


class Stop(Callback):
    """Ends the fit after seven steps."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 7


class Plain(Lit):
    """Each process has its share of the examples; no batch norm, which would see no others."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.net[1] = nn.Identity()
        self.batch_size = batch_size
        self.left_out = 0

    def train_dataloader(self) -> Any:
        rank = self.trainer.global_rank
        mine = range(rank, 320 - rank * self.left_out, self.trainer.world_size)
        return DataLoader(Subset(digits().dataset, mine), self.batch_size)


class Stoppable(Plain):
    """Its loader goes on where a fit was stopped."""

    def train_dataloader(self) -> Any:
        return ResumableLoader(super().train_dataloader().dataset, self.batch_size)


class Branches(Plain):
    """Takes another way in each process, and one way in none."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.ways = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.ways[self.trainer.global_rank](super().forward(images))


@dataclass(frozen=True)
class Partial(LocalCriterion):
    """Sees another network in each process."""

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        return weight.abs() * (-1) ** get_rank()

    def reduce(self, unit: Tensor) -> Tensor:
        return unit


class Uneven(Plain):
    """The last batch of an epoch is smaller in the second process."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.left_out = 20


def run(
    folder: Path,
    callback: PruningCallback,
    make: Callable[[int], Plain] = Plain,
    batch_size: int = 32,
    strategy: str = "ddp",
    devices: int = 2,
    callbacks: Sequence[Callback] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains in double precision, by default.

    Returns:
        Weights, masks and statistics.
    """
    model = seeded(lambda: make(batch_size))
    options = {"max_epochs": 3, "precision": "64-true", "use_distributed_sampler": False} | options
    parts = callback, *callbacks
    trainer(folder, *parts, strategy=strategy, devices=devices, **options).fit(model, ckpt_path=ckpt_path)
    statistics = callback.state_dict()["pruner"]["statistics"]
    return {"weights": model.state_dict(), "masks": dict(callback.masks), "statistics": statistics}


def stopped(folder: Path, make: Callable[[], PruningCallback]) -> dict[str, Any]:
    """A fit, and what it is when resumed: before the first event, between two, and after the last."""
    single = {"precision": "32-true"}  # Lightning loads a checkpoint before it doubles the precision
    saving = {"callbacks": [EveryStep(folder)], "enable_checkpointing": True}
    whole = run(folder, make(), Stoppable, **saving, **single)
    return {"whole": whole} | {
        f"from step {step}": run(folder, make(), Stoppable, ckpt_path=folder / f"step={step}.ckpt", **single)
        for step in (2, 7, 12)
    }


def distilled(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights after fits with a teacher, with the same in the loss, and with neither."""
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "precision": "64-true"}
    weights = {}
    for name, make, callbacks in (
        ("taught", Lit, [Distillation()]),
        ("explicit", Explicit, []),
        ("plain", Lit, []),
    ):
        model = seeded(make)
        fit(folder, model, *callbacks, **options)
        weights[name] = {name: each.detach() for name, each in model.named_parameters()}
    return weights


def main(folder: Path) -> None:
    """Every fit."""
    found = {name: run(folder, make()) for name, make in JOINT.items()}
    found |= {name: run(folder, make(), callbacks=[Stop()]) for name, make in GATHERED.items()}
    found["accumulated"] = run(folder, JOINT["weights"](), batch_size=16, accumulate_grad_batches=2)
    found["uneven"] = run(folder, JOINT["activations"](), Uneven)
    unused = PruningCallback(0.5, criterion=Taylor(), selector=PerLayer(), schedule=SCHEDULE)
    found["distilled"] = distilled(folder)
    found["unused"] = run(folder, unused, Branches, strategy="ddp_find_unused_parameters_true")
    found["cut"] = run(folder, cutting())
    found["cut and stopped"] = stopped(folder / "cut", cutting)
    found["stopped"] = {name: stopped(folder / name, make) for name, make in RESUMED.items()}
    try:
        run(folder, PruningCallback(0.5, criterion=Partial(), schedule=OneShot("3st")))
    except RuntimeError as error:
        found["error"] = {"text": str(error)}
    torch.save(found, folder / f"rank{get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_latency_quickly()
    draw_nothing()
    seed_everything(0, verbose=False)
    main(Path(sys.argv[1]))
