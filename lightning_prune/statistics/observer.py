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


class Observer(Protocol):
    """The part of a criterion that statistics are gathered for."""

    @property
    def needs(self) -> Needs:
        """What training must offer."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the running sums."""

    @property
    def activations(self) -> ActivationObserver | None:
        """What observes activations; ``None`` if the criterion needs none."""

    def pieces(self, group: UnitGroup) -> list[tuple[int, int]]:
        """Return the row ranges of a group that are observed one at a time."""

    def observe(self, group: UnitGroup, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what one observation adds to each of ``sums``."""

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], trial: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Return sums by group name, from losses on calibration batches."""
