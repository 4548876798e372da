"""What the statistics ask of a criterion: what it needs to see, and what one observation adds to its sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Flag, auto
from typing import Protocol

from torch import Tensor

from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.units.groups import UnitGroup


class Needs(Flag):
    """What training must offer before a criterion can score."""

    NOTHING = 0
    GRADIENT = auto()
    ACTIVATION = auto()
    LOSS = auto()

    @property
    def unseen(self) -> str:
        """What is missing in a loop that does not show it, and what shows it."""
        if Needs.LOSS in self:
            return "loss: give step() or prune() `losses=Losses(loss, batches)`"
        if Needs.ACTIVATION in self:
            return "activation yet: run forward and backward in `with pruner.watch():`"
        return "gradient yet: call observe() after backward"


class ActivationObserver(Protocol):
    """What a criterion of activations makes of the inputs of a layer."""

    @property
    def every(self) -> int:
        """Observe one batch in this many."""

    @property
    def backward(self) -> bool:
        """Whether ``look`` also needs the gradient of the loss with respect to the inputs."""

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return examples x features, given inputs (and their gradients) of examples x features x positions."""


class Observer:
    """The part of a criterion that statistics are gathered for.

    Attributes:
        needs: What training must offer.
        sums: Names of the running sums that ``observe`` adds to; one number a unit each.
        pointwise: Whether a unit's score depends on that unit alone, so that a large group may be scored
            in pieces.
    """

    # no ClassVar: the command line reads the types of a part where the part is, not here
    needs = Needs.NOTHING
    sums: tuple[str, ...] = ()
    pointwise: bool = True

    @property
    def activations(self) -> ActivationObserver | None:
        """What observes the inputs of layers in training steps; nothing by default."""
        return None

    def pieces(self, group: UnitGroup) -> list[tuple[int, int]]:
        """Return the row ranges of a group's units that are scored and observed one at a time."""
        return list(group.pieces()) if self.pointwise else [(0, group.shape[0])]

    def observe(self, group: UnitGroup, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what one observation adds to each of ``sums``.

        Args:
            group: The units.
            grads: The gradient of the loss for each slice of the group: unscaled, accumulated over
                micro-batches and not clipped.

        Returns:
            One tensor of the units' shape for each name in ``sums``.
        """
        return {}

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], trial: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Evaluate losses, at an event.

        Args:
            groups: All groups.
            kept: Group name to which units are still there; what is found of others does not matter.
            trial: A copy of the network as it stands.

        Returns:
            Group name to one tensor of the units' shape for each name in ``sums``; nothing by default.
        """
        return {}
