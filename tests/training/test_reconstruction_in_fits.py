"""Reconstruction in fits: the batches that a fit keeps, its passes on them, and what stands beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback
from lit import Lit, Manual, digits, fit, seeded, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    Channels,
    Guard,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Reconstruct,
    Rewind,
)

EPOCH = 5  # batches


class Before(Callback):
    """Copies the network when an epoch starts, before it is pruned."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.copy: Any = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.copy = copy.deepcopy(pl_module.net)


class After(Before):
    """Copies it after that."""


def images() -> list[Tensor]:
    return [batch[0] for batch in digits()]


def pruned_by_hand(net: nn.Module, reconstruct: Reconstruct, **parts: Any) -> Pruner:
    pruner = Pruner(net, parts.pop("target"), schedule=None, **parts)
    pruner.prune(1.0, reconstruct=reconstruct, batches=images()[: reconstruct.batches])
    return pruner


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, msg=f"{name} differs")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    "parts",
    [
        {"target": 0.8},
        {"target": 0.5, "structure": Channels(), "selector": PerLayer(), "example": images()[0][:2]},
    ],
)
def test_an_event_gives_the_weights_of_a_loop_by_hand(
    tmp_path: Path, parts: dict[str, Any], precision: str
) -> None:
    reconstruct = Reconstruct(batches=EPOCH)
    before, after = Before(2), After(2)
    own = {name: each for name, each in parts.items() if name != "example"}
    callback = PruningCallback(**own, schedule=OneShot("2ep"), reconstruct=reconstruct)
    fit(tmp_path, seeded(Lit), before, callback, after, max_epochs=3, precision=precision)
    dtype = after.copy[0].weight.dtype
    by_hand = before.copy.to(torch.float32)
    pruner = pruned_by_hand(by_hand, reconstruct, **copy.copy(parts))
    assert {name.removeprefix("net."): int(mask.sum()) for name, mask in callback.masks.items()} == {
        name: int(mask.sum()) for name, mask in pruner.masks.items()
    }
    assert not callback.report.unreconstructed
    for one, other in zip(after.copy.parameters(), by_hand.parameters(), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=1e-3, atol=1e-4)


class Views(Lit):
    """Runs its network twice in a step, on two views, and a head that forward does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        views = self(images), self(images.flip(3))
        return sum(F.cross_entropy(self.head(view), labels) for view in views)  # type: ignore[return-value]


class Bare(Lit):
    """Has no forward, and returns no loss in evaluation mode."""

    forward = None  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss if self.training else None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class TrainsOnly(Lit):
    """Its step fails in evaluation mode, after it has called forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not self.training:
            raise RuntimeError("for training")
        return loss


@pytest.mark.parametrize(
    ("make", "left"),
    [(Views, {"head.weight": "its layer runs 0 times in a pass"}), (Bare, {}), (TrainsOnly, {}), (Manual, {})],
)
def test_passes_are_those_that_run_most_layers_once(tmp_path: Path, make: Any, left: dict[str, str]) -> None:
    callback = PruningCallback(0.8, schedule=OneShot("1ep"), reconstruct=Reconstruct(batches=EPOCH))
    fit(tmp_path, seeded(make), callback, max_epochs=2)
    report = callback.report
    assert report.unreconstructed == left
    assert json.loads(report.to_json())["unreconstructed"] == left
    assert ("head.weight was not reconstructed: its layer" in report.table()) is bool(left)


def test_what_a_fit_keeps_is_dropped_after_the_last_event(tmp_path: Path) -> None:
    callback = PruningCallback(0.8, schedule=OneShot("1ep"), reconstruct=Reconstruct(batches=3, ridge=0.1))
    kept = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            kept.append(len(callback.state_dict()["held"]))

    with pytest.warns(UserWarning, match=r"net.4.weight has 192 rows of calibration data for 288 inputs: its"):
        fit(tmp_path, Lit(), callback, Look(), max_epochs=2)
    assert kept == [1, 2, 3, 3, 3, 0, 0, 0, 0, 0]


def test_a_guard_takes_biases_and_norms_back_too(tmp_path: Path) -> None:
    before = Before(2)
    callback = PruningCallback(
        0.95,
        schedule=OneShot("2ep"),
        reconstruct=Reconstruct(batches=EPOCH),
        guard=Guard("acc", max_drop=0.0),
    )
    model = seeded(lambda: Lit(lambda parameters: torch.optim.SGD(parameters, 1e-12)))
    with pytest.warns(UserWarning, match="back to 0 % removed"):
        fit(tmp_path, model, before, callback, max_epochs=3)
    assert callback.undone
    for name, tensor in before.copy.named_parameters():
        torch.testing.assert_close(model.net.get_parameter(name), tensor)


def test_averages_are_masked_and_learning_rates_go_back(tmp_path: Path) -> None:
    model = seeded(Lit)
    model.average = AveragedModel(model.net)
    callback = PruningCallback(
        0.8,
        schedule=OneShot("1ep"),
        reconstruct=Reconstruct(batches=EPOCH),
        rewind=Rewind(weights=False),
    )
    fit(tmp_path, model, callback, max_epochs=2)
    mask = callback.masks["net.4.weight"]
    assert not model.average.module[4].weight[~mask].any()
    assert not model.net[4].weight[~mask].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewind": Rewind()}, r"rewind=Rewind\(.*takes back the weights that reconstruct=.*weights=False"),
        ({"reconstruct": 3}, "reconstruct=3 is no Reconstruct"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningCallback(0.5, **({"reconstruct": Reconstruct()} | arguments))


def test_an_event_before_the_first_batch_is_refused(tmp_path: Path) -> None:
    callback = PruningCallback(0.5, schedule=OneShot("0ep"), reconstruct=Reconstruct())
    with pytest.raises(ValueError, match=r"prunes before the first batch, when Reconstruct\(.*has seen none"):
        fit(tmp_path, Lit(), callback)


class NeverOutside(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            raise RuntimeError("for training")
        return self.loss(batch)


def test_a_step_that_cannot_run_is_refused_before_it_trains(tmp_path: Path) -> None:
    model = NeverOutside()
    before = copy.deepcopy(model.state_dict())
    callback = PruningCallback(0.5, schedule=OneShot("1ep"), reconstruct=Reconstruct())
    with pytest.raises(
        ValueError, match=r"training_step does not run in evaluation mode outside the loop \(Run"
    ):
        trainer(tmp_path, callback).fit(model, digits())
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
