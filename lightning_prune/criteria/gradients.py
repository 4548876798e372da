"""Criteria that watch the gradients of ordinary training steps."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.criteria.base import LocalCriterion


class Gradient(LocalCriterion):
    r"""Differential pruning: what the loss no longer pulls at goes first. :math:`E \sum |g|`.

    Accumulates the absolute gradient of each connection over training steps ("Understanding Differential
    Pruning in Neural Networks"; nearest published: FGGP, arXiv 2411.05500). Gradients also vanish for
    important weights once training has converged; :class:`Taylor`, which weighs the gradient with the
    weight, does not have that weakness.
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The absolute gradient."""
        return grad.abs()


class Taylor(LocalCriterion):
    r"""Change of the loss, to first order, if the unit went: :math:`E (\sum w g)^2`.

    The sum runs over all that makes the unit. Where a norm follows, a layer's own weights add up to 0, since
    their scale does not matter, and the norm's scale and shift are left: the paper's gate. Molchanov et al.
    2019, "Importance Estimation for Neural Network Pruning", CVPR (the square of the unit's sum, as in the
    paper).
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The first-order change of the loss, with sign."""
        return weight * grad

    def reduce(self, unit: Tensor) -> Tensor:
        """Any change counts, up or down."""
        return unit.square()


class Movement(LocalCriterion):
    r"""Weights that move towards zero go: :math:`-E \sum w g`, negative for what shrinks.

    Made for fine-tuning, where the size of a weight says more about pre-training than about the task.
    Sanh et al. 2020, "Movement Pruning", NeurIPS.
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Positive where a gradient step takes the weight away from zero."""
        return -weight * grad


class Fisher(LocalCriterion):
    r"""Change of the loss, to second order, with the diagonal empirical Fisher: :math:`\frac12 E \sum (w g)^2`.

    The sum of squares where :class:`Taylor` takes the square of the sum: on single weights the two rank
    alike, on larger units they part. The expectation is over optimizer steps, not single examples, which is
    ours. Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning".
    """

    def local(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Half of the curvature's estimate times the squared weight."""
        return (weight * grad).square_().mul_(0.5)
