"""Criteria that ask the loss itself, on training batches held for it: by brute force or by its curvature."""

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
from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup

_WORST = 1e30  # stands for a change that is no number


@dataclass(frozen=True, repr=False)
class LossCriterion(Criterion):
    """A score worked out at the event itself, on a copy of the network in evaluation mode.

    The first training batches of a fit are held for it, on the CPU and in checkpoints, until the last event.

    Args:
        batches: How many; fewer where the event comes before them.
        max_passes: How many passes of a batch through the network one event may take.

    Raises:
        ValueError: If one of them is no whole number above 0; in a Trainer before the first training step, if
            an event would take more passes than that.
    """

    needs = Needs.LOSS
    sums = ("score",)

    batches: int = 10
    max_passes: int = 100_000

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, max_passes=self.max_passes)

    @property
    def held(self) -> int:
        """As many as are asked for."""
        return self.batches

    @abstractmethod
    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """At most so many."""

    @abstractmethod
    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], trial: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """The scores, under "score"."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """What was measured."""
        return statistics.mean("score")


@dataclass(frozen=True, repr=False)
class Oracle(LossCriterion):
    r"""Brute force: how much the loss changes without the unit, :math:`|L(w_u = 0) - L|`.

    The ground truth that other criteria are compared with: slow, and exact for one unit at a time. Where all
    ``batches`` would take more than ``max_passes``, fewer are looked at. Molchanov et al. 2016, "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440.
    """

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """One for each unit and batch."""
        units = sum(group.size for group in groups)
        return units * self._batches(units)

    def _batches(self, units: int) -> int:
        return max(1, min(self.batches, self.max_passes // units))

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], trial: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """A unit after the other."""
        batches = self._batches(sum(group.size for group in groups))
        dense = trial.loss(batches)
        if not dense.isfinite():
            raise RuntimeError(
                f"{self!r} has nothing to compare with: the loss on held batches is {float(dense)}."
            )
        found = {}
        for group in groups:
            there = kept[group.name]
            places = there.nonzero()
            bar = progress_bar(places, f"{self!r}: {group.name}", trial.progress)
            losses = trial.losses(group, (_without(there, place) for place in bar), batches)
            changes = torch.zeros(group.shape, dtype=group.dtype, device=there.device)
            # where nothing works without a unit, it matters most
            found_here = (losses - dense).abs().nan_to_num(nan=_WORST, posinf=_WORST).clamp_max(_WORST)
            changes[tuple(places.T)] = found_here.to(changes)
            found[group.name] = {"score": changes}
        return found


@dataclass(frozen=True, repr=False)
class OptimalBrainDamage(LossCriterion):
    r"""Change of the loss, to second order, by the curvature alone: :math:`\sum \frac12 h w^2`.

    h is the diagonal of the Hessian of the mean loss over the held batches, with its sign: where it is negative
    the loss falls without the weight, and that goes first. At a minimum the first-order term is 0, which the
    method takes for granted, as it does that weights do not interact. LeCun, Denker and Solla 1989, "Optimal
    Brain Damage", NeurIPS.

    Args:
        estimator: "exact", by autograd, a pass back for each weight; "hutchinson", the mean of
            :math:`v \odot H v` over random signs v, without bias and noisy (Bekas, Kokiopoulou and Saad 2007,
            "An estimator for the diagonal of a matrix"); or "fisher", the mean over batches of the squared
            gradient, which is never negative, stands for h near a minimum alone, and has a scale of its own.
        probes: How many v for each batch.
        seed: Of their signs.

    Raises:
        ValueError: If an argument is none of these.
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
        """There and back for each batch, and back again for each probe or weight."""
        shares = {part.name: part.weight for group in groups for part in group.slices}
        elements = sum(weight.numel() for weight in shares.values())
        return self.batches * {"exact": elements, "hutchinson": self.probes, "fisher": 1}[self.estimator]

    def rehearse(self, groups: Sequence[UnitGroup], trial: LossEvaluator) -> Tensor:
        """There and back, and back again."""
        weights = list(trial.copies(part for group in groups for part in group.slices).values())
        (loss,) = trial.differentiable(1)
        grads = _gradients(loss, weights, twice=self.estimator != "fisher")
        if self.estimator != "fisher":
            grads = _gradients(cast(Tensor, sum(grad.sum() for grad in grads)), weights)
        return grads[0].sum()

    def measure(
        self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], trial: LossEvaluator
    ) -> dict[str, dict[str, Tensor]]:
        """Half of the curvature times the squared weights, added up over each unit."""
        weights = trial.copies(part for group in groups for part in group.slices)
        chosen = list(weights.values())
        # half precision is too coarse to add up in
        totals = [
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in chosen
        ]
        batches = min(self.batches, trial.batches)
        estimate, draws = _ESTIMATORS[self.estimator], torch.Generator().manual_seed(self.seed)
        for loss in progress_bar(trial.differentiable(batches), repr(self), trial.progress, batches):
            signs = ([_signs(weight, draws) for weight in chosen] for _ in range(self.probes))
            for total, found in zip(totals, estimate(loss, chosen, signs, trial), strict=True):
                total.add_(found)
        means = [trial.mean(total, batches) for total in totals]
        curvature = dict(zip(weights, means, strict=True))
        scores = {}
        for group in groups:
            curvatures = [curvature[part.name] for part in group.slices]
            scores[group.name] = {"score": group.sum(_saliency, group.weights, curvatures)}
        return scores


def _exact(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], trial: LossEvaluator
) -> list[Tensor]:
    diagonals = []
    for weight, grad in zip(weights, _gradients(loss, weights, twice=True), strict=True):
        diagonal = torch.zeros_like(grad)
        for place in product(*map(range, weight.shape)):
            diagonal[place] = _gradients(grad[place], [weight], again=True)[0][place]
        diagonals.append(diagonal)
    return diagonals


def _hutchinson(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], trial: LossEvaluator
) -> list[Tensor]:
    grads = _gradients(loss, weights, twice=True)
    products = []
    for vectors in signs:
        slope = sum((grad * vector).sum() for grad, vector in zip(grads, vectors, strict=True))
        curved = _gradients(cast(Tensor, slope), weights, again=True)
        products.append([_fine(vector * each) for vector, each in zip(vectors, curved, strict=True)])
    return [torch.stack(each).mean(0) for each in zip(*products, strict=True)]


def _fisher(
    loss: Tensor, weights: Sequence[Tensor], signs: Iterable[Sequence[Tensor]], trial: LossEvaluator
) -> list[Tensor]:
    return [trial.joint(_fine(grad)).square() for grad in _gradients(loss, weights)]


_Estimator: TypeAlias = Callable[
    [Tensor, Sequence[Tensor], Iterable[Sequence[Tensor]], LossEvaluator], list[Tensor]
]
_ESTIMATORS: dict[str, _Estimator] = {"exact": _exact, "hutchinson": _hutchinson, "fisher": _fisher}


def _gradients(
    of: Tensor, weights: Sequence[Tensor], twice: bool = False, again: bool = False
) -> tuple[Tensor, ...]:
    """0 where a loss does not depend on a weight, or only in a straight line."""
    if not of.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights)
    return torch.autograd.grad(
        of, weights, create_graph=twice, retain_graph=twice or again, allow_unused=True, materialize_grads=True
    )


def _fine(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _signs(like: Tensor, draws: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=draws) * 2 - 1).to(like)


def _saliency(weight: Tensor, curvature: Tensor) -> Tensor:
    return curvature * weight.square() / 2


def _without(kept: Tensor, place: Tensor) -> Tensor:
    units = kept.clone()
    units[tuple(place)] = False
    return units
