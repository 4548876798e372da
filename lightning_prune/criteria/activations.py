"""Criteria that observe activations: the inputs of the layers that read a unit, in sampled training steps.

A channel is one feature, at all positions of an image or sequence and in all layers that read it. Single
weights and blocks are scored by the inputs of their own layer.
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
    """Scores units by the inputs of the layers that read them: the mean over examples of one number a feature.

    Args:
        every: In a Trainer, one batch in this many is observed, and the first batch after an event.

    Attributes:
        backward: Whether the gradient of the loss with respect to the activations is observed, too.
    """

    needs = Needs.ACTIVATION
    pointwise = False
    backward: ClassVar[bool] = False

    every: int = 10

    def __post_init__(self) -> None:
        check_counts(every=self.every)

    @property
    def activations(self) -> ActivationCriterion:
        """The criterion itself, as the observer of activations."""
        return self

    @abstractmethod
    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return one number for each example and feature, from the inputs of one layer.

        Args:
            inputs: The inputs, examples x features x positions.
            grads: If ``backward``, the gradient of the loss with respect to them, through this layer alone.

        Returns:
            Examples x features.
        """

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason if no linear or convolution layer reads the units."""
        return None if group.readers else f"{self!r} needs a layer that reads the units"

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the mean over the features of each unit."""
        features = self.features(statistics)
        if group.input_dim is None:
            return features
        (part,), (reader,) = group.slices, group.readers
        spread = reader.spread(features)
        return part.sum(spread) / part.sum(torch.ones_like(spread))

    def features(self, statistics: Statistics) -> Tensor:
        """Return the mean over examples of the observed number of each feature."""
        return statistics.features / statistics.count


@dataclass(frozen=True, repr=False)
class ActivationTaylor(ActivationCriterion):
    r"""Change of the loss, to first order, without a feature map: :math:`E |\frac1M \sum z \, dL/dz|`.

    The sum runs over the M positions of the map, the mean over examples. Scores of layers of different sizes
    are not comparable, so divide those of each layer by their norm: ``Global(normalize="l2")``. If several
    layers read a unit, the score is the mean over them, which is ours. :class:`Taylor` computes the product
    without hooks, but sums it over the batch before the sign is dropped. Molchanov et al. 2016, "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440.
    """

    backward = True

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return the absolute mean over positions of activation times gradient."""
        assert grads is not None
        return (inputs * grads).mean(2).abs()


@dataclass(frozen=True, repr=False)
class APoZ(ActivationCriterion):
    """Share of activations that are not 0: one minus the Average Percentage of Zeros, so that higher = keep.

    For units that a ReLU follows; other activations are never exactly 0. Hu et al. 2016, "Network Trimming: A
    Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", arXiv 1607.03250.
    """

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return the share of positions at which the activation is not 0."""
        return inputs.ne(0).to(inputs.dtype).mean(2)


@dataclass(frozen=True, repr=False)
class ActivationNorm(ActivationCriterion):
    r"""Root mean square of the activations of a unit: :math:`\sqrt{E z^2}`, over examples and positions."""

    def look(self, inputs: Tensor, grads: Tensor | None) -> Tensor:
        """Return the mean square over positions."""
        return inputs.square().mean(2)

    def features(self, statistics: Statistics) -> Tensor:
        """Return the root of the mean square of each feature."""
        return super().features(statistics).sqrt()


@dataclass(frozen=True, repr=False)
class Wanda(ActivationNorm):
    r"""Weights times the norm of their inputs: :math:`|w_{ij}| \, \lVert x_j \rVert_2`.

    Single weights and blocks are compared within an output, as in the paper: their score is the rank in their
    row, from 1 / inputs to 1, so that every row loses the same share. The score of a channel is the sum over
    all weights that read it, which is ours. Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
    Language Models", arXiv 2306.11695.
    """

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the sum of the products of each channel, or the rank of each single weight or block."""
        norms = self.features(statistics)
        if group.input_dim is None:
            return norms * torch.stack([part.sum(part.weight.detach().abs()) for part in group.readers]).sum(0)
        (part,), (reader,), (weight,) = group.slices, group.readers, group.weights
        score = part.sum(weight.abs() * reader.spread(norms))
        rows = score.movedim(1 - group.input_dim, 0)
        # of equal scores the earlier ranks higher
        order = rows.flatten(1).argsort(dim=1, descending=True, stable=True)
        ranks: Tensor = 1 - order.argsort(dim=1).to(score.dtype) / order.shape[1]
        return ranks.view(rows.shape).movedim(0, 1 - group.input_dim)
