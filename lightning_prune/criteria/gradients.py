"""Criteria that observe the gradients of ordinary training steps."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.criteria.base import LocalCriterion


class Gradient(LocalCriterion):
    r"""Differential pruning: removes the weights with the smallest gradients, by :math:`E \sum |g|`.

    Accumulates the absolute gradient of each connection over training steps ("Understanding Differential
    Pruning in Neural Networks"; nearest published: FGGP, arXiv 2411.05500). Gradients also vanish for
    important weights once training has converged; :class:`Taylor`, which multiplies the gradient by the
    weight, does not have that weakness.
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the absolute gradient."""
        return grad.abs()


class Taylor(LocalCriterion):
    r"""Change of the loss, to first order, if the unit is removed: :math:`E (\sum w g)^2`.

    The sum runs over all weights of the unit. If a norm follows a layer, the products of the layer's weights
    add up to 0, since the output of the norm does not depend on their scale, and the products of the norm's
    scale and shift remain: the gate of the paper. Molchanov et al. 2019, "Importance Estimation for Neural
    Network Pruning", CVPR (the square of the unit's sum, as in the paper).
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the first-order change of the loss, with its sign."""
        return weight * grad

    def reduce(self, unit: Tensor) -> Tensor:
        """Return the square, so that a change of the loss in either direction counts."""
        return unit.square()


class Movement(LocalCriterion):
    r"""Removes weights that move towards zero: :math:`-E \sum w g` is negative for those that shrink.

    Made for fine-tuning, where the size of a weight says more about pre-training than about the task.
    Sanh et al. 2020, "Movement Pruning", NeurIPS.
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return a value that is positive where a gradient step moves the weight away from zero."""
        return -weight * grad


class Fisher(LocalCriterion):
    r"""Change of the loss, to second order, with the diagonal empirical Fisher: :math:`\frac12 E \sum (w g)^2`.

    The sum of squares, where :class:`Taylor` takes the square of the sum: the two give the same ranking of
    single weights, but not of larger units. The expectation is over optimizer steps, not single examples, which
    is ours. Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning".
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return half of the estimated curvature times the squared weight."""
        return (weight * grad).square_().mul_(0.5)
