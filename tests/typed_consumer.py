"""What a program with types makes of the package: mypy and pyright check it, and nothing runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import assert_type

from lightning_prune import (
    Channels,
    Criterion,
    Distillation,
    Global,
    Guard,
    LocalCriterion,
    Magnitude,
    OneshotResult,
    PrunedCheckpoint,
    Pruner,
    PruningCallback,
    Reconstruct,
    Report,
    Sensitivity,
    Steps,
    Taylor,
    compact,
    export_onnx,
    load_compact,
    measure,
    oneshot,
    save_packed,
    sensitivity,
)


class Persistence(LocalCriterion):
    """A criterion of one's own."""

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the product."""
        return weight * grad


@dataclass(frozen=True, repr=False)
class Power(Magnitude):
    """One with an argument."""

    exponent: float = 2.0


def fit(model: LightningModule, criterion: Criterion) -> Report:
    """Return the report of a fit."""
    pruning = PruningCallback(
        {"encoder*": 0.3, "*": 0.5},
        criterion=criterion,
        structure=Channels(exclude=[nn.Conv1d, "head*"], round_to=8),
        selector=Global(budget="macs", normalize="cost"),
        schedule=Steps({"20%": 0.5, "50%": 1.0}),
        guard=Guard("val_acc", max_drop=0.02),
        reconstruct=Reconstruct(batches=4),
        compact=True,
    )
    trainer = Trainer(callbacks=[pruning, Distillation(weight=0.5), PrunedCheckpoint(monitor="val_acc")])
    trainer.fit(model)
    assert_type(pruning.masks, Mapping[str, Tensor])
    assert_type(pruning.report.sparsity, float)
    assert_type(oneshot(trainer, model), OneshotResult)
    return pruning.report


def fit_by_taylor(model: LightningModule) -> Report:
    """Return the report of a fit with a criterion of the package."""
    return fit(model, Taylor())


def by_hand(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a smaller network."""
    pruner = Pruner(model, 0.5, criterion=Persistence(), structure=Channels(), example=images)
    pruner.step(1.0)
    smaller = compact(model, pruner.masks, images)
    assert_type(measure(smaller, example=images), Report)
    assert_type(sensitivity(model, lambda network: 0.0), Sensitivity)
    assert_type(export_onnx(smaller, "net.onnx", images), int)
    assert_type(save_packed(model, pruner.masks, "net.packed"), int)
    return load_compact("small.ckpt", model)
