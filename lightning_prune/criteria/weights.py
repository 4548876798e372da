"""Criteria that look at the weights alone."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics import Statistics
from lightning_prune.units import UnitGroup


@dataclass(frozen=True, repr=False)
class Magnitude(Criterion):
    r"""Size of the weights: :math:`\sum |w|^p` over the unit, biases and norms left out.

    The first choice: free, and hard to beat once the survivors retrain. Han et al. 2015, "Learning both
    Weights and Connections", NeurIPS; for filters (p = 1) Li et al. 2017, "Pruning Filters for Efficient
    ConvNets", ICLR.

    Args:
        p: The power, above 0.
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.p, int | float) and 0 < self.p < math.inf):
            raise ValueError(f"p={self.p!r} must be a finite number above 0.")

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """The sum of powers."""
        group = group.matrices
        if self.p == 1:
            return group.sum(torch.abs, group.weights)
        return group.sum(lambda weight: weight.abs().pow_(self.p), group.weights)

    def deviation(self, group: UnitGroup, scores: Tensor, kept: Tensor) -> float:
        """That of the weights themselves where each is a unit and p is 1, as Han et al. 2015 have it."""
        single = self.p == 1 and group.slices[0].dim is None
        return super().deviation(group, group.weights[0] if single else scores, kept)


@dataclass(frozen=True, repr=False)
class Random(Criterion):
    """Chance: the control that every comparison needs. A unit keeps its draw through a run.

    Args:
        seed: Of the draws, which are otherwise independent of training.
    """

    pointwise = False

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer.")

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """A uniform draw in [0, 1) for each unit."""
        # The name keeps layers of one shape apart; crc32, unlike hash(), is the same in every process.
        seed = zlib.crc32(f"{self.seed} {group.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        device = group.slices[0].weight.device
        return torch.rand(group.shape, generator=generator).to(device)
