"""What happens within a step: number formats, loss scaling, optimizers, recomputation."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, loose, masked
from lightnings import BackboneFinetuning, Callback, LightningModule, MixedPrecision, Trainer
from lit import Lit, Manual, fit, same, seeded
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW
from torch.utils.checkpoint import checkpoint

from lightning_prune import (
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    Channels,
    Criterion,
    Fisher,
    Linear,
    OneShot,
    Pruner,
    PruningCallback,
    Structure,
    Taylor,
    Unstructured,
    Wanda,
)

EVENTS = Linear("1ep", "3ep", every="1ep")


class Watch(Callback):
    """Checks after every batch that masked weights are 0, and what optimizers remember of them."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.remembered = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert loose(self.pruning, pl_module) == 0
        parameters = dict(pl_module.named_parameters())
        for optimizer in trainer.optimizers:
            for name, mask in self.pruning.masks.items():
                for value in optimizer.state.get(parameters[name], {}).values():
                    if torch.is_tensor(value) and value.shape == mask.shape:
                        self.remembered += 1
                        assert not value[~mask].any(), name


def scaled(**options: Any) -> dict[str, Any]:
    """Half precision with a loss scale, on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))]}


REMOVED = {"weights": 4840 // 2, "channels": 24 // 2, "2:4": (4608 + 160) // 2}


def removed(pruning: PruningCallback, kind: str) -> int:
    """How many units are gone: weights, or whole rows."""
    if kind != "channels":
        return masked(pruning)
    rows = (pruning.masks[name].flatten(1) for name in ("net.0.weight", "net.4.weight"))
    return sum(int((~row).all(1).sum()) for row in rows)


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": scaled(init_scale=1024.0),
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
}
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_are_zero_in_every_precision(tmp_path: Path, kind: str, precision: str) -> None:
    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    model, watch = seeded(Lit), Watch(pruning)
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2, **PRECISIONS[precision]}
    fit(tmp_path, model, pruning, watch, **options)
    assert model.net[4].weight.dtype == DTYPES.get(precision, torch.float32)
    assert watch.remembered > 0
    assert pruning.report.left_out == 0
    assert len(pruning.report.history) == 3
    assert removed(pruning, kind) == REMOVED[kind]


class Skipped(Callback):
    """Counts steps that changed nothing, from the weights themselves, and the examples of all the others."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = pl_module.net[6].bias.detach().clone()
        self.skipped = self.taken = self.examples = self.waiting = self.seen = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.waiting += len(batch[0])
        if trainer.global_step == self.seen:
            return
        skipped = torch.equal(pl_module.net[6].bias, self.before)
        self.skipped += skipped
        self.taken += not skipped
        self.examples += 0 if skipped else self.waiting
        self.before.copy_(pl_module.net[6].bias)
        self.seen, self.waiting = trainer.global_step, 0


class Forgetting(Manual):
    """With one optimizer; has no gradients left when a batch ends."""

    def configure_optimizers(self) -> Any:
        return [SGD(self.parameters(), 0.01)]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return [super().optimizers(use_pl_optimizer)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()


def stepping(make: Any, **options: Any) -> Any:
    return lambda: seeded(make), options


SKIPPING = {
    "unscaled first": stepping(partial(Lit, partial(SGD, lr=0.01, fused=False))),
    "fused": stepping(partial(Lit, partial(SGD, lr=0.01, fused=True))),
    "accumulated": stepping(partial(Lit, partial(SGD, lr=0.01)), accumulate_grad_batches=2),
    "manual": stepping(Forgetting),
}


@pytest.mark.parametrize("way", SKIPPING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", [Taylor(), ActivationTaylor(every=1), APoZ(every=1)])
def test_steps_that_the_loss_scaler_skips_are_left_out_and_counted(
    tmp_path: Path, criterion: Criterion, kind: str, way: str
) -> None:
    """Counts, of steps or of examples, and sums are those of the steps that were taken."""
    pruning = KINDS[kind](criterion=criterion, schedule=OneShot("2ep"))
    seen: dict[str, Any] = {}

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                state = pruning.state_dict()["pruner"]
                seen["counts"] = {int(each["count"]) for each in state["statistics"].values()}
                seen["skipped"] = skipped.skipped
                seen["expected"] = skipped.taken if isinstance(criterion, Taylor) else skipped.examples
                sums = [value for each in state["statistics"].values() for value in each["sums"].values()]
                assert all(bool(value.isfinite().all()) for value in sums)

    skipped = Skipped()
    make, options = SKIPPING[way]
    model = make()
    fit(tmp_path, model, pruning, skipped, Keep(), max_epochs=3, **options, **scaled(init_scale=2.0**22))
    assert 0 < seen["skipped"] < 10
    assert seen["counts"] == {seen["expected"]}
    assert pruning.report.left_out == seen["skipped"]
    assert loose(pruning, model) == 0


# capturable optimizers are for accelerators
OPTIMIZERS: dict[str, Any] = {
    "fused sgd": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "fused adamw": partial(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "fused adagrad": partial(Adagrad, lr=0.01, fused=True),
    "foreach sgd": partial(SGD, lr=0.05, momentum=0.9, foreach=True),
    "foreach adam": partial(Adam, lr=0.01, amsgrad=True, foreach=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_are_zero_under_every_implementation_of_an_optimizer(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    watch = Watch(pruning)
    fit(tmp_path, seeded(lambda: Lit(OPTIMIZERS[optimizer])), pruning, watch)
    assert watch.remembered > 0
    assert removed(pruning, kind) == REMOVED[kind]


@pytest.mark.parametrize("make", [Manual, partial(Lit, partial(LBFGS, lr=0.01, max_iter=3))])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_are_zero_where_the_step_is_of_another_kind(
    tmp_path: Path, kind: str, make: Any
) -> None:
    """Two optimizers under manual optimization; one that goes through each batch several times."""
    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    watch = Watch(pruning)
    fit(tmp_path, model := seeded(make), pruning, watch)
    assert pruning.report.history[-1].step == 15
    assert removed(pruning, kind) == REMOVED[kind]
    assert loose(pruning, model) == 0


class Sharpness(SGD):
    """Steps by hand, as recipes of sharpness-aware minimization do: out, back, then with another optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.05, momentum=0.9)
        self.base = SGD(self.param_groups)

    @torch.no_grad()
    def move(self, length: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad, alpha=length)


class Sharp(Lit):
    def __init__(self) -> None:
        super().__init__(Sharpness)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.move(0.05)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.move(-0.05)
        optimizer.base.step()
        optimizer.zero_grad()


class Unknown(Lit):
    """Has an optimizer that Lightning does not know of."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.own = [SGD(self.parameters(), 0.05, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.own[0].zero_grad()
        self.manual_backward(self.loss(batch))
        self.own[0].step()

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("make", [Sharp, Unknown])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*configure_optimizers.* returned .None.:UserWarning")
@pytest.mark.filterwarnings("ignore:The fit ended before the last pruning event:UserWarning")
def test_masked_weights_are_zero_after_steps_that_lightning_does_not_see(
    tmp_path: Path, kind: str, make: Any
) -> None:
    pruning = KINDS[kind](schedule=EVENTS)

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert loose(pruning, pl_module) == 0

    fit(tmp_path, model := seeded(make), pruning, Looks())
    assert removed(pruning, kind) == REMOVED[kind]
    assert loose(pruning, model) == 0
    with pytest.warns(UserWarning, match=r"no finite step yet\. .* step what self\.optimizers\(\)"):
        fit(tmp_path, seeded(make), KINDS[kind](criterion=Taylor(), schedule=OneShot("1ep")), max_epochs=2)


def test_directions_of_a_single_parameter_are_zero_where_masked() -> None:
    model = nn.Linear(4, 2, bias=False)
    optimizer = LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.eye(4)) - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    pruner = Pruner(model, 0.5, schedule=None)
    pruner.prune(1.0, optimizer)
    line = optimizer.state[model.weight]["d"]
    assert not line[~pruner.masks["weight"].flatten()].any()
    assert line.any()


@pytest.mark.parametrize("kind", KINDS)
def test_directions_that_an_optimizer_remembers_are_zero_where_masked(tmp_path: Path, kind: str) -> None:
    """Within a step, too, no masked weight comes alive."""
    pruning = KINDS[kind](schedule=EVENTS)
    alive: list[int] = []

    class Looks(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            alive.append(loose(pruning, self) if pruning.masks else 0)
            return super().training_step(batch, batch_idx)

    line_search = partial(LBFGS, lr=0.1, max_iter=4, history_size=3, line_search_fn="strong_wolfe")
    run = fit(tmp_path, model := seeded(lambda: Looks(line_search)), pruning)
    assert len(alive) > 40
    assert sum(alive) == 0
    state = run.optimizers[0].state[next(model.parameters())]
    named = list(model.named_parameters())
    for line in (state["d"], *state["old_dirs"], *state["old_stps"]):
        pieces = line.split([parameter.numel() for _, parameter in named])
        for (name, parameter), piece in zip(named, pieces, strict=True):
            if name in pruning.masks:
                assert not piece.view(parameter.shape)[~pruning.masks[name]].any()


class Split(Manual):
    """Matrices and what is one number a unit learn by optimizers of their own."""

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim == 1]
        return [SGD(matrices, self.lr), SGD(others, self.lr)]


class Whole(Split):
    def configure_optimizers(self) -> Any:
        return [SGD(self.parameters(), self.lr)]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return [super().optimizers(use_pl_optimizer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", [Taylor(), Fisher()])
def test_units_whose_weights_several_optimizers_step_are_observed(
    tmp_path: Path, kind: str, criterion: Criterion
) -> None:
    """As with one optimizer, exactly."""
    found = []
    for make in (Split, Whole):
        pruning = KINDS[kind](criterion=criterion, schedule=EVENTS)
        fit(tmp_path, model := seeded(make), pruning)
        found.append({**model.state_dict(), **pruning.masks})
        assert removed(pruning, kind) == REMOVED[kind]
    assert same(*found)


# --- recomputation


class Recomputing(Lit):
    """Computes the inner part of the network again in the backward pass."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__(partial(SGD, lr=0.0))
        self.net[1] = nn.Identity()  # whose statistics would be taken twice
        self.use_reentrant = use_reentrant

    def forward(self, images: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.net(images)
        images = (
            images.detach().requires_grad_()
        )  # reentrant recomputation wants some input that has a gradient
        found = checkpoint(self.net[:5], images, use_reentrant=self.use_reentrant)
        return self.net[5:](found)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("criterion", "structure", "each"),
    [
        (Taylor(), Unstructured(), 1),
        (Taylor(), Channels(), 1),
        (Wanda(every=1), Unstructured(), 64),
        (ActivationTaylor(every=1), Channels(), 64),
        (ActivationNorm(every=1), Channels(), 64),
        (APoZ(every=1), Channels(), 64),
    ],
)
def test_what_is_computed_again_counts_once(
    tmp_path: Path, criterion: Criterion, structure: Structure, each: int, use_reentrant: bool
) -> None:
    def seen(use_reentrant: bool | None) -> Any:
        pruning = PruningCallback(0.5, criterion=criterion, structure=structure, schedule=OneShot("1ep"))
        found: list[Any] = []

        class Keep(Callback):
            def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
                if not found:
                    for name, own in deepcopy(pruning.state_dict()["pruner"]["statistics"]).items():
                        found.append((name, int(own["count"]), own["sums"], own["features"]))

        fit(tmp_path, seeded(lambda: Recomputing(use_reentrant)), pruning, Keep(), max_epochs=2)
        return found

    plain = seen(None)
    assert {count for _, count, *_ in plain} == {5 * each}
    assert same(seen(use_reentrant), plain)


# --- layers that thaw, share or compute their weights


class Backbone(Lit):
    """The first layers are a backbone, which is no part of the optimizer at first."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[:4]

    def configure_optimizers(self) -> Any:
        return self.optimizer([each for each in self.parameters() if each.requires_grad])


@pytest.mark.filterwarnings("ignore:A pruning event left:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_that_thaws_stays_masked(tmp_path: Path, kind: str) -> None:
    frozen: list[Tensor] = []

    class Moves(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            frozen.append(pl_module.net[0].bias.detach().clone())

    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    thaw, watch = BackboneFinetuning(unfreeze_backbone_at_epoch=2, train_bn=False), Watch(pruning)
    run = fit(tmp_path, model := seeded(Backbone), thaw, pruning, watch, Moves(), max_epochs=5)
    assert len(run.optimizers[0].param_groups) == 2
    assert torch.equal(frozen[0], frozen[1]) or kind == "channels"  # masked where a channel went
    assert not torch.equal(frozen[2], frozen[3])
    assert loose(pruning, model) == 0
    assert masked(pruning) > 1000


class Tied(Lit):
    """Two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        self.net[5].weight = self.net[3].weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_two_layers_share_is_masked_once(tmp_path: Path, kind: str) -> None:
    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    fit(tmp_path, model := seeded(Tied), pruning, watch := Watch(pruning))
    assert model.net[5].weight is model.net[3].weight
    assert "net.3.weight" in pruning.masks
    assert "net.5.weight" not in pruning.masks
    assert int((model.net[5].weight == 0).sum()) == int((~pruning.masks["net.3.weight"]).sum()) > 0
    assert watch.remembered > 0
    if kind != "channels":
        assert masked(pruning) == (64 * 32 + 32 * 32 + 32 * 10) // 2


class Computed(Lit):
    """The first two layers compute their weights from other parameters."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for index in (0, 4):
            norm(self.net[index])


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["weights", "2:4"])
def test_computed_weights_stay_with_the_reason(tmp_path: Path, kind: str, norm: str) -> None:
    pruning = KINDS[kind](criterion=Taylor(), schedule=EVENTS)
    fit(tmp_path, seeded(lambda: Computed(NORMS[norm])), pruning)
    why = "computed from other parameters (a parametrisation)"
    frozen = pruning.report.frozen
    assert {name for name, each in frozen.items() if each == why} == {"net.0.weight", "net.4.weight"}
    source = "a parametrisation computes a weight from it: name it in include to prune it"
    source += " (the computed weight need not be sparse)"
    assert {each for each in frozen.values() if each != why} == {source}
    assert {name: int((~mask).sum()) for name, mask in pruning.masks.items()} == {"net.6.weight": 80}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_channels_of_computed_weights_go_or_are_refused(tmp_path: Path, norm: str) -> None:
    """A row of zeros has a spectral norm, but no direction."""
    pruning = PruningCallback(0.5, criterion=Taylor(), structure=Channels(), schedule=EVENTS)
    model = seeded(lambda: Computed(NORMS[norm]))
    if "weight" in norm:
        with pytest.raises(ValueError, match=r"nothing to prune .*net\.0\..*0 has no direction"):
            fit(tmp_path, model, pruning)
        return
    fit(tmp_path, model, pruning, watch := Watch(pruning))
    assert watch.remembered > 0
    hidden = model.net[4].weight.detach()
    assert int((hidden == 0).all(1).sum()) > 0
