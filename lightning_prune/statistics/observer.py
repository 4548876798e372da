"""The part of a criterion that observes: the data that it needs, and its contribution to the running sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Flag, auto
from typing import Protocol

from torch import Tensor, nn

from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.units.groups import UnitGroup, row_ranges


class Needs(Flag):
    """The data from training that a criterion or selector needs."""

    NOTHING = 0
    GRADIENT = auto()
    ACTIVATION = auto()
    LOSS = auto()
    CALIBRATION = auto()

    @property
    def missing(self) -> str:
        """The missing data, and how to provide it in a user's own training loop, for an error message."""
        if Needs.LOSS in self:
            return "loss: give step(), prune() or scores() `losses=Losses(loss, batches)`"
        if Needs.CALIBRATION in self:
            return "calibration batch: give step(), prune() or scores() `batches=[...]`"
        if Needs.ACTIVATION in self:
            return "activation yet: run forward and backward in `with pruner.watch():`"
        return "gradient yet: call observe() after backward() and before zero_grad()"


class ActivationObserver(Protocol):
    """An observer of the inputs of layers, in sampled training steps."""

    @property
    def every(self) -> int:
        """Observe one batch in this many."""

    @property
    def backward(self) -> bool:
        """Whether ``look`` also needs the gradient of the loss with respect to the inputs."""

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return one number for each example and input feature of a layer.

        Args:
            inputs: The layer's inputs, examples x features x positions.
            grads: The gradient of the loss with respect to them, of the same shape, if ``backward``; otherwise
                ``None``.

        Returns:
            A tensor of examples x features.
        """


class Observer:
    """The part of a criterion for which statistics are collected.

    Attributes:
        needs: The data that training must provide.
        sums: Names of the running sums that ``observe`` adds to; each holds one number a unit.
        pointwise: Whether a unit's score depends on that unit alone, so that a large group may be scored
            in pieces.
    """

    # no ClassVar: the command line resolves annotations in the module of a subclass, not in this one
    needs = Needs.NOTHING
    sums: tuple[str, ...] = ()
    pointwise: bool = True

    @property
    def activations(self) -> ActivationObserver | None:
        """The observer of the inputs of layers in training steps; ``None`` by default."""
        return None

    def pieces(self, group: UnitGroup) -> list[tuple[int, int]]:
        """Return the row ranges of a group's units that are scored and observed one at a time.

        Returns:
            Pairs of start and stop. A single range if scores are not ``pointwise``, or the group is not
            ``divisible``; otherwise ranges that fit a processor's cache.
        """
        if not self.pointwise or not group.divisible:
            return [(0, group.shape[0])]
        weight = group.slices[0].weight
        return list(row_ranges(len(weight), weight.numel(), weight.device))

    def observe(self, group: UnitGroup, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the values that one observation adds to each of ``sums``.

        Args:
            group: The units.
            grads: The gradient of the loss for each slice of the group: unscaled, accumulated over
                micro-batches and not clipped.

        Returns:
            One tensor of the units' shape for each name in ``sums``.
        """
        return {}

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], evaluator: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Evaluate losses at a pruning event.

        Args:
            groups: All groups.
            kept: Group name to a bool mask of its units, True where a unit is kept. Results for removed units
                are ignored.
            evaluator: Evaluates the loss on a copy of the model, with its current weights.

        Returns:
            Group name to one tensor of the units' shape for each name in ``sums``; empty by default.
        """
        return {}

    def calibrate(
        self,
        groups: Sequence[UnitGroup],
        kept: Mapping[str, Tensor],
        model: nn.Module,
        calibration: Calibration,
    ) -> dict[str, dict[str, Tensor]]:
        """Look at the inputs of layers at a pruning event.

        Args:
            groups: All groups.
            kept: Group name to a bool mask of its units, True where a unit is kept. Results for removed units
                are ignored.
            model: The network, with its current weights; it does not change.
            calibration: Passes of the network on calibration batches.

        Returns:
            Group name to one tensor of the units' shape for each name in ``sums``; empty by default.
        """
        return {}
