"""Criteria that use the weights alone: no gradients, activations or losses."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_prune.core.parts import check_seed, is_number
from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices


@dataclass(frozen=True, repr=False)
class Magnitude(Criterion):
    r"""Size of the weights: :math:`\sum |w|^p` over the unit, biases and norms left out.

    A good first choice: it needs no observations, and is hard to beat after retraining. Han et al. 2015,
    "Learning both Weights and Connections", NeurIPS; for filters (p = 1) Li et al. 2017, "Pruning Filters for
    Efficient ConvNets", ICLR.

    Args:
        p: The exponent, above 0.
    """

    p: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.p) or self.p <= 0:
            raise ValueError(f"p={self.p!r} must be a finite number above 0.")

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the sum over each unit of the absolute weights to the power ``p``."""
        group = group.matrices
        return group.sum(lambda weight: weight.abs().pow_(self.p), group.weights)

    def deviation(self, group: UnitGroup, scores: Tensor, kept: Tensor) -> float:
        """Return that of the weights themselves for single weights and p = 1, as in Han et al. 2015."""
        single = self.p == 1 and group.divisible
        return super().deviation(group, group.weights[0] if single else scores, kept)


@dataclass(frozen=True, repr=False)
class BatchNormScale(Criterion):
    r"""Scale of the batch norm that a channel goes through: :math:`\sum |\gamma|` over the norms of the unit.

    For channels; those without a batch norm stay. Until the last event :math:`\lambda \sum |\gamma|` may be
    added to the loss, through its gradient, so that scales separate into small and large ones. Liu et al. 2017,
    "Learning Efficient Convolutional Networks through Network Slimming", ICCV. The sum over several norms, as
    in a residual stream, is ours.

    Args:
        l1: :math:`\lambda`, at least 0; the paper uses 1e-4 and 1e-5.

    Raises:
        ValueError: If ``l1`` is negative or not a finite number.
    """

    l1: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.l1) or self.l1 < 0:
            raise ValueError(f"l1={self.l1!r} must be a finite number of at least 0.")

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason if no batch norm scales the units."""
        if group.scales is not None:
            return None
        return (
            f"{self!r} needs structure=Channels() and a batch norm with a scale (affine=True) after the layer"
        )

    def penalty(self, group: UnitGroup) -> dict[str, Tensor]:
        """Return the gradient of ``l1`` times the sum of the absolute scales."""
        if self.l1 == 0:
            return {}
        found = {}
        for part in axis_slices(cast(UnitGroup, group.scales).slices):
            pull = self.l1 * part.weight.detach().sign()
            found[part.name] = pull if part.index is None else pull * (part.index >= 0)
        return found

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the sum of the absolute scales of each unit."""
        scales = cast(UnitGroup, group.scales)
        return scales.sum(torch.abs, scales.weights)


class LAMP(Criterion):
    r"""Layer-adaptive magnitude: :math:`w_u^2 / \sum w_v^2` over all :math:`v` of the layer as large or larger.

    Magnitude on a scale that is comparable across layers, for ``Global``: within a layer the ranking is that of
    ``Magnitude(p=2)``, and the largest unit of each layer scores 1. For units of several weights the square is
    the sum of their squares, which is ours. Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based
    Pruning", ICLR.
    """

    pointwise = False

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the share of each unit in the sum of squares of the units that are as large or larger."""
        group = group.matrices
        size = group.sum(torch.square, group.weights)
        order = size.flatten().argsort(descending=True, stable=True)  # of equal units the earlier scores higher
        larger = torch.empty_like(size.flatten(), dtype=torch.float64)
        larger[order] = size.flatten()[order].cumsum(0, dtype=torch.float64)
        share = size / larger.view(size.shape).clamp_min(torch.finfo(torch.float64).tiny)
        return share.to(size.dtype)


class FPGM(Criterion):
    r"""Distance to the other units of the group: :math:`\sum_v \lVert w_u - w_v \rVert_2`.

    Units near the geometric median of all can be represented by the others, and are removed first, whatever
    their magnitude. Biases and norms are left out. He et al. 2019, "Filter Pruning via Geometric Median for
    Deep Convolutional Neural Networks Acceleration", CVPR.
    """

    pointwise = False

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason for single weights, and for units that lie in tensors of their own."""
        if group.divisible:
            return f"{self!r} needs units of several weights"
        return None if group.slices[0].spans else f"{self!r} needs units that lie along one dimension"

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the sum of the Euclidean distances of each unit to the others that are kept."""
        group = group.matrices
        vectors = [part.vectors(weight) for part, weight in zip(group.slices, group.weights, strict=True)]
        points = torch.cat(vectors, 1)
        distances = torch.cdist(points, points[points.any(1)])  # not to removed units, which are 0
        return distances.sum(1).view(group.shape)


@dataclass(frozen=True, repr=False)
class Random(Criterion):
    """Random scores: the control that every comparison needs. A unit keeps its score throughout a run.

    Args:
        seed: Seed of the scores, which do not depend on training.
    """

    pointwise = False

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return a uniform random number in [0, 1) for each unit."""
        # The name gives layers of one shape different scores; crc32, unlike hash(), agrees in all processes.
        seed = zlib.crc32(f"{self.seed} {group.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(group.shape, generator=generator).to(group.slices[0].weight.device)
