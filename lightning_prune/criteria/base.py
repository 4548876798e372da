"""The base classes of criteria: a criterion scores units from tensors alone, whatever layer they are in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_prune.core.parts import Part
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs, Observer
from lightning_prune.statistics.reconstruction.layer_matrices import LayerMatrix
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup


class Criterion(Observer, Part, ABC):
    """Decides how much each unit matters: observes training, and computes scores from the observations.

    Attributes:
        max_passes: Upper limit of the number of passes of a batch through the network in one event.
    """

    max_passes: float = math.inf

    @property
    def held(self) -> int:
        """Number of calibration batches (training batches kept to evaluate losses) that the criterion uses."""
        return 0

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return how many passes of a batch through the network one event takes to evaluate losses."""
        return 0

    @property
    def fewer_passes(self) -> str:
        """What a user can do to lower ``passes``, for an error message."""
        return "leave layers out with include and exclude"

    def rehearse(self, groups: Sequence[UnitGroup], evaluator: LossEvaluator) -> Tensor:
        """Run one pass of those that ``passes`` counts, to check that it works and to measure its duration.

        Args:
            groups: All groups.
            evaluator: A copy of the network.

        Returns:
            A 0-d tensor that depends on the result of the pass.
        """
        return evaluator.loss(1)

    def for_pattern(self, n: int, m: int) -> Criterion:
        """Return the criterion for a selector that keeps ``n`` of ``m`` inputs; by default itself."""
        return self

    def refuses(self, group: UnitGroup) -> str | None:
        """Return why the criterion cannot score a group, or ``None`` if it can."""
        return None

    def refuses_layers(self, group: UnitGroup, matrices: Sequence[LayerMatrix]) -> str | None:
        """Return why the criterion cannot be calibrated on the layers that read a group; ``None`` by default.

        Args:
            group: The unit group.
            matrices: The matrices of the layers that read it, as far as these can be calibrated.
        """
        return None

    def penalty(self, group: UnitGroup) -> dict[str, Tensor]:
        """Return the gradient of a penalty that is added to the loss until the last event; empty by default.

        Args:
            group: The unit group.

        Returns:
            Parameter name to a tensor of the parameter's shape.
        """
        return {}

    @abstractmethod
    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the scores of the units.

        Args:
            group: The unit group, with its present weights.
            statistics: The running sums over all observations since the last event.

        Returns:
            One finite number a unit, of the units' shape. Higher = keep.
        """

    def deviation(self, group: UnitGroup, scores: Tensor, kept: Tensor) -> float:
        """Return the standard deviation on the scale of the scores, for ``Threshold(std=...)``.

        Args:
            group: The unit group.
            scores: The scores of all units.
            kept: Bool, True for the units that are still kept.

        Returns:
            The standard deviation over the kept units; 0 if there is only one.
        """
        values = scores[kept]
        return float(values.std()) if values.numel() > 1 else 0.0


class LocalCriterion(Criterion):
    """Scores each unit by the mean over observations of ``reduce(sum over the unit of local(w, g))``.

    A subclass defines ``local``, and ``reduce`` if the sum is to be transformed before it is averaged.
    """

    needs = Needs.GRADIENT
    sums = ("score",)

    @abstractmethod
    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the value of each element, given weights and gradients of the same shape."""

    def reduce(self, unit: Tensor) -> Tensor:
        """Return the transformed sums of the units, once per observation; the sums themselves by default."""
        return unit

    def observe(self, group: UnitGroup, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the reduced sums of this observation."""
        return {"score": self.reduce(group.sum(self.local, group.weights, grads))}

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the mean over observations."""
        return statistics.mean("score")
