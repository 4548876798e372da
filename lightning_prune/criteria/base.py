"""What a criterion is: scores for units, from tensors alone. It never asks what layer they are in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_prune.core.parts import Part
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs, Observer
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup


class Criterion(Observer, Part, ABC):
    """How much a unit matters: what it observes in training, and the score that it makes of that.

    Attributes:
        max_passes: How many passes of a batch through the network one event may take.
    """

    max_passes: float = math.inf

    @property
    def held(self) -> int:
        """How many training batches are held for it."""
        return 0

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """How many passes of a batch through the network one event takes, to ask for losses."""
        return 0

    def rehearse(self, groups: Sequence[UnitGroup], trial: LossEvaluator) -> Tensor:
        """One such pass, to see that it works and how long it takes: gives some number that comes of it."""
        return trial.loss(1)

    def refuses(self, group: UnitGroup) -> str | None:
        """Why the criterion has nothing to say of a group, or ``None`` if it has."""
        return None

    def penalty(self, group: UnitGroup) -> dict[str, Tensor]:
        """The gradient of what is added to the loss until the last event; nothing by default.

        Args:
            group: The units.

        Returns:
            Parameter name to a tensor of the parameter's shape.
        """
        return {}

    @abstractmethod
    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """The units' scores.

        Args:
            group: The units, with their present weights.
            statistics: The sums over all observations since the last event.

        Returns:
            One finite number a unit, of the units' shape. Higher = keep.
        """

    def deviation(self, group: UnitGroup, scores: Tensor, kept: Tensor) -> float:
        """Standard deviation on the scale of the scores, for ``Threshold(std=...)``.

        Args:
            group: The units.
            scores: Of all of them.
            kept: Which are still there; 0 is returned for a single one.
        """
        values = scores[kept]
        return float(values.std()) if values.numel() > 1 else 0.0


class LocalCriterion(Criterion):
    """A score built elementwise: the mean over observations of ``reduce(sum over the unit of local(w, g))``.

    A subclass says what ``local`` is, and ``reduce`` if the unit's sum is not the score yet.
    """

    needs = Needs.GRADIENT
    sums = ("score",)

    @abstractmethod
    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The value of one element, from tensors of one shape."""

    def reduce(self, unit: Tensor) -> Tensor:
        """What is made of a unit's sum, once an observation."""
        return unit

    def observe(self, group: UnitGroup, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """The reduced sums of this observation."""
        return {"score": self.reduce(group.sum(self.local, group.weights, grads))}

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """The mean over observations."""
        return statistics.mean("score")
