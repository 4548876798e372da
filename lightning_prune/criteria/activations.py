"""Criteria that watch activations: what the layers that read a unit are given, in sampled training steps.

A unit of channels is one feature, at all positions of an image or sequence, and in all layers that read it.
Single weights and blocks are scored by the inputs of their own layer.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.core.parts import check_counts
from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup


@dataclass(frozen=True, repr=False)
class ActivationCriterion(Criterion):
    """A score of what layers read: the mean over examples of one number a feature.

    Args:
        every: In a Trainer, every how manyth batch is looked at, and the first one after an event.

    Attributes:
        backward: Whether the loss's gradient with respect to the activations is looked at, too.
    """

    needs = Needs.ACTIVATION
    pointwise = False
    backward: ClassVar[bool] = False

    every: int = 10

    def __post_init__(self) -> None:
        check_counts(every=self.every)

    @property
    def activations(self) -> ActivationCriterion:
        """The criterion itself."""
        return self

    @abstractmethod
    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """What one layer's inputs tell.

        Args:
            inputs: Examples x features x positions.
            grads: The loss's gradient with respect to them, through this layer alone, if ``backward``.

        Returns:
            Examples x features.
        """

    def refuses(self, group: UnitGroup) -> str | None:
        """What no linear or convolution layer reads."""
        return None if group.readers else f"{self!r} needs a layer that reads the units"

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """The mean of a unit's features."""
        return _of_units(group, self.features(statistics))

    def features(self, statistics: Statistics) -> Tensor:
        """One number a feature."""
        return statistics.features / statistics.count


@dataclass(frozen=True, repr=False)
class ActivationTaylor(ActivationCriterion):
    r"""Change of the loss, to first order, without a feature map: :math:`E |\frac1M \sum z \, dL/dz|`.

    The sum runs over the M positions of the map, the mean over examples. Scores of layers of different sizes
    compare badly, so divide each layer's by their norm: ``Global(normalize="l2")``. Where several layers read a
    unit, the mean over them, which is ours. :class:`Taylor` has the product without hooks, summed over the
    batch before its size is taken. Molchanov et al. 2016, "Pruning Convolutional Neural Networks for Resource
    Efficient Inference", arXiv 1611.06440.
    """

    backward = True

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """The size of the mean product."""
        assert grads is not None
        return (inputs * grads).mean(2).abs()


@dataclass(frozen=True, repr=False)
class APoZ(ActivationCriterion):
    """Share of activations that are not 0: one minus the Average Percentage of Zeros, so that higher = keep.

    For units under a ReLU; elsewhere nothing is ever 0. Hu et al. 2016, "Network Trimming: A Data-Driven Neuron
    Pruning Approach towards Efficient Deep Architectures", arXiv 1607.03250.
    """

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """The share."""
        return inputs.ne(0).to(inputs.dtype).mean(2)


@dataclass(frozen=True, repr=False)
class ActivationNorm(ActivationCriterion):
    r"""Root mean square of what a unit gives: :math:`\sqrt{E z^2}`, over examples and positions."""

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """The mean square."""
        return inputs.square().mean(2)

    def features(self, statistics: Statistics) -> Tensor:
        """Its root."""
        return super().features(statistics).sqrt()


@dataclass(frozen=True, repr=False)
class Wanda(ActivationNorm):
    r"""Weights times the norm of what they read: :math:`|w_{ij}| \, \lVert x_j \rVert_2`.

    Single weights and blocks are compared within an output, as the paper has it: their score is the rank in
    their row, from 1 / inputs to 1, so that every row loses the same share. A unit of channels scores the sum
    over all that reads it, which is ours. Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
    Language Models", arXiv 2306.11695.
    """

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """The sum of products, or its rank."""
        norms = self.features(statistics)
        if group.input_dim is None:
            return norms * torch.stack([part.sum(part.weight.detach().abs()) for part in group.readers]).sum(0)
        (part,), (reader,), (weight,) = group.slices, group.readers, group.weights
        score = part.sum(weight.abs() * reader.spread(norms))
        rows = score.movedim(1 - group.input_dim, 0)
        # of equals the earlier ranks higher
        order = rows.flatten(1).argsort(dim=1, descending=True, stable=True)
        ranks: Tensor = 1 - order.argsort(dim=1).to(score.dtype) / order.shape[1]
        return ranks.view(rows.shape).movedim(0, 1 - group.input_dim)


def _of_units(group: UnitGroup, features: Tensor) -> Tensor:
    """For each unit the mean over its features."""
    if group.input_dim is None:
        return features
    (part,), (reader,) = group.slices, group.readers
    spread = reader.spread(features)
    return part.sum(spread) / part.sum(torch.ones_like(spread))
