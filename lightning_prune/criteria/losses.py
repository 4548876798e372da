"""Criteria that evaluate the loss on calibration batches: by brute force or by its curvature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from lightning_prune.core.parts import check_counts, check_seed
from lightning_prune.core.progress import progress_bar
from lightning_prune.core.tensors import dense
from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup

_WORST = 1e30  # replaces changes of the loss that are nan, infinite or larger


@dataclass(frozen=True, repr=False)
class LossCriterion(Criterion):
    """Scores units by the loss at the event itself, on a copy of the network in evaluation mode.

    The first training batches of a fit are kept as calibration batches, on the CPU and in checkpoints, until
    the last event.

    Args:
        batches: Number of calibration batches; fewer are used if the event comes before there are as many.
        max_passes: Upper limit of the number of passes of a batch through the network in one event.

    Raises:
        ValueError: If an argument is no whole number above 0, or if an event would take more passes than
            ``max_passes``; in a Trainer the latter is raised before the first training step.
    """

    needs = Needs.LOSS
    sums = ("score",)

    batches: int = 10
    max_passes: int = 100_000

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, max_passes=self.max_passes)

    @property
    def held(self) -> int:
        """Number of calibration batches, which is the argument ``batches``."""
        return self.batches

    @abstractmethod
    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return an upper bound of the number of passes of a batch through the network in one event."""

    @abstractmethod
    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], evaluator: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Return the scores: group name to a dictionary with one entry, "score"."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the scores that ``measure`` computed."""
        return statistics.mean("score")


@dataclass(frozen=True, repr=False)
class Oracle(LossCriterion):
    r"""Brute force: how much the loss changes without the unit, :math:`|L(w_u = 0) - L|`.

    The ground truth that other criteria are compared with: slow, and exact for one unit at a time. If all
    ``batches`` would take more than ``max_passes``, fewer batches are used. Molchanov et al. 2016, "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440.
    """

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return one pass for each unit and batch."""
        units = sum(group.size for group in groups)
        return units * self._batches(units)

    def _batches(self, units: int) -> int:
        """Return how many batches ``max_passes`` allows for so many units, at least 1."""
        return max(1, min(self.batches, self.max_passes // units))

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], evaluator: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Return the absolute change of the loss without each unit, one unit at a time."""
        batches = self._batches(sum(group.size for group in groups))
        dense = evaluator.loss(batches)
        if not dense.isfinite():
            raise RuntimeError(
                f"{self!r} has nothing to compare with: the loss on held batches is {float(dense)}."
            )
        found = {}
        for group in groups:
            present = kept[group.name]
            places = present.nonzero()
            bar = progress_bar(places, f"{self!r}: {group.name}", evaluator.progress)
            losses = evaluator.losses(group, (_without(present, place) for place in bar), batches)
            scores = torch.zeros(group.shape, dtype=group.dtype, device=present.device)
            # a unit without which the loss is not finite matters most
            changes = (losses - dense).abs().nan_to_num(nan=_WORST, posinf=_WORST).clamp_max(_WORST)
            scores[present] = changes.to(scores)
            found[group.name] = {"score": scores}
        return found


@dataclass(frozen=True, repr=False)
class OptimalBrainDamage(LossCriterion):
    r"""Change of the loss, to second order, by the curvature alone: :math:`\sum \frac12 h w^2`.

    h is the diagonal of the Hessian of the mean loss over the calibration batches, with its sign: a weight with
    a negative h is removed first, since the loss falls without it. The method assumes that the first-order term
    is 0, as at a minimum, and that weights do not interact. LeCun, Denker and Solla 1989, "Optimal
    Brain Damage", NeurIPS.

    Args:
        estimator: How h is estimated: "exact", by autograd, with one backward pass for each weight;
            "hutchinson", the mean of :math:`v \odot H v` over vectors v of random signs, unbiased and noisy
            (Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix"); or "fisher", the
            mean over batches of the squared gradient, which is never negative, approximates h only near a
            minimum, and has a scale of its own.
        probes: Number of vectors v for each batch, for "hutchinson".
        seed: Seed of their signs.

    Raises:
        ValueError: If an argument has none of these values.
    """

    estimator: Literal["exact", "hutchinson", "fisher"] = "fisher"
    probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in tuple(_ESTIMATORS):
            known = ", ".join(map(repr, _ESTIMATORS))
            raise ValueError(f"estimator={self.estimator!r} must be one of {known}.")
        check_counts(probes=self.probes)
        check_seed(self.seed)

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return one pass for each batch, times the number of weights ("exact") or of probes ("hutchinson")."""
        sizes = {part.name: part.weight.numel() for group in groups for part in group.slices}
        elements = sum(sizes.values())
        return self.batches * {"exact": elements, "hutchinson": self.probes, "fisher": 1}[self.estimator]

    @property
    def fewer_passes(self) -> str:
        """What lowers ``passes``: fewer layers for "exact", fewer batches or probes otherwise."""
        lower = f"lower batches={self.batches}"
        return {
            "exact": super().fewer_passes,
            "hutchinson": f"{lower} or probes={self.probes}",
            "fisher": lower,
        }[self.estimator]

    def rehearse(self, groups: Sequence[UnitGroup], evaluator: LossEvaluator) -> Tensor:
        """Run a forward and a backward pass, and a second backward pass unless the estimator is "fisher"."""
        weights = list(evaluator.parameters_of(part for group in groups for part in group.slices).values())
        (loss,) = evaluator.differentiable(1)
        grads = _gradients(loss, weights, create_graph=self.estimator != "fisher")
        if self.estimator != "fisher":
            grads = _gradients(cast(Tensor, sum(grad.sum() for grad in grads)), weights)
        return grads[0].sum()

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], evaluator: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Return half of the curvature times the squared weights, summed over each unit."""
        weights = evaluator.parameters_of(part for group in groups for part in group.slices)
        chosen = list(weights.values())
        totals = {name: _widened(torch.zeros_like(weight)) for name, weight in weights.items()}
        batches = min(self.batches, evaluator.batches)
        estimate, draws = _ESTIMATORS[self.estimator], torch.Generator().manual_seed(self.seed)
        for loss in progress_bar(evaluator.differentiable(batches), repr(self), evaluator.progress, batches):
            signs = ([_signs(weight, draws) for weight in chosen] for _ in range(self.probes))
            for total, found in zip(totals.values(), estimate(loss, chosen, signs, evaluator), strict=True):
                total.add_(found)
        curvature = {name: evaluator.mean(total, batches) for name, total in totals.items()}
        scores = {}
        for group in groups:
            curvatures = [curvature[part.name] for part in group.slices]
            scores[group.name] = {"score": group.sum(_saliency, group.weights, curvatures)}
        return scores


def _exact(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], evaluator: LossEvaluator
) -> list[Tensor]:
    """Return the diagonal of the Hessian for each weight tensor, row by row of the Hessian."""
    diagonals = []
    for weight, grad in zip(weights, _gradients(loss, weights, create_graph=True), strict=True):
        diagonal = torch.zeros_like(grad)
        for place in product(*map(range, weight.shape)):
            diagonal[place] = _gradients(grad[place], [weight], retain_graph=True)[0][place]
        diagonals.append(diagonal)
    return diagonals


def _hutchinson(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], evaluator: LossEvaluator
) -> list[Tensor]:
    """Return the mean over ``signs`` of v times the Hessian-vector product with v."""
    grads = _gradients(loss, weights, create_graph=True)
    products = []
    for vectors in signs:
        slope = sum((grad * vector).sum() for grad, vector in zip(grads, vectors, strict=True))
        curved = _gradients(cast(Tensor, slope), weights, retain_graph=True)
        products.append([_widened(vector * each) for vector, each in zip(vectors, curved, strict=True)])
    return [torch.stack(each).mean(0) for each in zip(*products, strict=True)]


def _fisher(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], evaluator: LossEvaluator
) -> list[Tensor]:
    """Return the squared gradients of the loss over the batch in all processes."""
    return [evaluator.mean_over_ranks(_widened(grad)).square() for grad in _gradients(loss, weights)]


_Estimator: TypeAlias = Callable[
    [Tensor, Sequence[Tensor], Iterable[Sequence[Tensor]], LossEvaluator], list[Tensor]
]
_ESTIMATORS: dict[str, _Estimator] = {"exact": _exact, "hutchinson": _hutchinson, "fisher": _fisher}


def _gradients(
    of: Tensor, weights: Sequence[Tensor], create_graph: bool = False, retain_graph: bool | None = None
) -> tuple[Tensor, ...]:
    """Return the gradients of a scalar; 0 where it does not depend on a weight.

    The second derivatives of a loss that is linear in a weight are such a case. The flags are those of
    :func:`torch.autograd.grad`.
    """
    if not of.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights)
    grads = torch.autograd.grad(
        of, weights, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
    return tuple(map(dense, grads))


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it has half precision, which is too coarse for sums."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _signs(like: Tensor, draws: torch.Generator) -> Tensor:
    """Return random signs, -1 or 1, in a tensor like the given one."""
    return (torch.randint(0, 2, like.shape, generator=draws) * 2 - 1).to(like)


def _saliency(weight: Tensor, curvature: Tensor) -> Tensor:
    return curvature * weight.square() / 2


def _without(kept: Tensor, place: Tensor) -> Tensor:
    """Return a copy of ``kept`` with one unit removed."""
    units = kept.clone()
    units[tuple(place)] = False
    return units
