"""Which units go: exact selection within a layer or over all of them, whatever their number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_prune.core.parts import is_integer, is_number
from lightning_prune.selectors.base import Costs, Selector, checked_share
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import remove_lowest, remove_to_cost, remove_up_to
from lightning_prune.units.groups import UnitGroup, Units

_BUDGETS = ("units", "params", "macs")
_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda scores: scores.norm(),
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().max(),
}
_LEAST_PRICE = 1e-15  # a share of the network: what saves nothing goes last


@dataclass(frozen=True, repr=False)
class Global(Selector):
    """The lowest scores of the whole network: ``round(target * units)`` of them, exactly.

    Layers end up with different shares, so scores must be comparable across layers. Rounding is to the
    nearest, half to even; ties keep the earlier unit. One radix search over all scores, without a sort.

    Args:
        budget: What the target is a share of: "units" that may go, or "params" or "macs" of the whole network
            with all that is frozen. Those are met as nearly as units allow, coupling counted: a channel costs
            in the layers that make it and in those that read it.
        normalize: What scores of each group are divided by before they are compared: ``None``, their "l2"
            norm (Molchanov et al. 2016, arXiv 1611.06440), their "mean" or "max" size, or the "cost" of one
            unit in the budget at present widths. If scores are changes of the loss, as those of ``Taylor``,
            the last is the greedy solution of the knapsack problem: the least loss for what is saved. Ours.
        cost_weight: What is taken from each score, once it is divided: this times what one unit saves in the
            budget at present widths, as a share of the network (Molchanov et al. 2016, who count in billions of
            multiply-adds and choose 1e-3).

    Raises:
        ValueError: If an argument is none of these, or there is no budget to count costs in.
    """

    budget: Literal["units", "params", "macs"] = "units"
    normalize: Literal["l2", "mean", "max", "cost"] | None = None
    cost_weight: float = 0.0

    def resolve(self, target: float | None) -> float:
        """The target itself, a number in (0, 1)."""
        return checked_share(target, self)

    def __post_init__(self) -> None:
        for argument, known in (("budget", _BUDGETS), ("normalize", (None, *_NORMS, "cost"))):
            if getattr(self, argument) not in known:
                given = getattr(self, argument)
                raise ValueError(f"{argument}={given!r} must be one of {', '.join(map(repr, known))}.")
        if not is_number(self.cost_weight) or self.cost_weight < 0:
            raise ValueError(f"cost_weight={self.cost_weight!r} must be a finite number of at least 0.")
        if self.budget == "units" and (self.normalize == "cost" or self.cost_weight > 0):
            given = "normalize='cost'" if self.normalize == "cost" else f"cost_weight={self.cost_weight!r}"
            raise ValueError(f"{given} needs budget='params' or budget='macs': all units cost 1.")

    @property
    def needs_example(self) -> bool:
        """Multiply-adds depend on how large images are, say."""
        return self.budget == "macs"

    def check(self, share: float, units: Units) -> None:
        """The least of every group must be within the budget."""
        if self.budget == "units":
            return
        least = {group.name: torch.arange(group.size) < group.least for group in units.groups}
        budget = units.budgets[self.budget]
        reachable = 1 - budget.cost(least) / budget.total
        if share > reachable:
            frozen = "; ".join(f"{name}: {why}" for name, why in units.frozen.items())
            raise ValueError(
                f"target={share!r} of the network's {self.budget} is out of reach: {reachable:.4f} are, if each"
                f" layer keeps its least. {frozen}".rstrip()
            )

    def splits(self, group: UnitGroup) -> bool:
        """As long as a unit counts for itself, and scores are compared as they are."""
        return self.budget == "units" and self.normalize is None

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Removes the lowest of all."""

        def cost() -> float:
            return costs(self.budget)

        if self.normalize == "cost":
            for each in candidates:
                each.weigh(_price(each, cost))
        elif self.normalize is not None:
            for each in candidates:
                each.divide(float(_NORMS[self.normalize](each.scores()[each.kept])) or 1.0)
        if self.cost_weight > 0:
            for each in candidates:
                each.charge(self.cost_weight * _price(each, cost))
        if self.budget == "units":
            remove_lowest(candidates, round(fraction * sum(each.size for each in candidates)))
        else:
            remove_to_cost(candidates, cost, 1 - fraction)


def _price(candidates: Candidates, cost: Callable[[], float]) -> float:
    """What one of the units that are there costs, which stands for all; tiny if that is nothing."""
    kept = candidates.kept
    one = torch.unravel_index(kept.flatten().view(torch.uint8).argmax(), kept.shape)
    before = cost()
    kept[one] = False
    price = before - cost()
    kept[one] = True
    return max(price, _LEAST_PRICE)


@dataclass(frozen=True, repr=False)
class PerLayer(Selector):
    """The lowest scores of each group: ``round(target * units)`` in every one, exactly."""

    def resolve(self, target: float | None) -> float:
        """The target itself, a number in (0, 1)."""
        return checked_share(target, self)

    def splits(self, group: UnitGroup) -> bool:
        """All of them."""
        return True

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Removes the lowest of each."""
        for each in candidates:
            remove_lowest([each], round(fraction * each.size))


@dataclass(frozen=True, repr=False)
class Threshold(Selector):
    """Whatever scores up to a level: the count follows from the scores. Goes with ``target=None``.

    Give exactly one of the arguments. The schedule scales it, from 0 to its full value. Levels are taken
    anew at each event, from the units that are still there; for scores that are not negative.

    Args:
        value: The level itself.
        quantile: Share of each layer's units, in (0, 1).
        mean: In each layer, this times the mean score.
        std: In each layer, this times the standard deviation: of the weights with ``Magnitude`` on single
            weights (Han et al. 2015), otherwise of the scores.

    Raises:
        ValueError: If not exactly one argument is given, or it is out of range.
    """

    value: float | None = None
    quantile: float | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        given = {name: number for name, number in vars(self).items() if number is not None}
        if len(given) != 1:
            raise ValueError(f"{self!r}: give exactly one of value, quantile, mean and std.")
        ((name, number),) = given.items()
        limit = 1.0 if name == "quantile" else math.inf
        if not is_number(number) or not 0 < number < limit:
            raise ValueError(f"{name}={number!r} must be a number above 0 and below {limit}.")

    def resolve(self, target: float | None) -> float:
        """The whole level; there is no target."""
        if target is not None:
            raise ValueError(f"target={target!r} must be None for {self!r}, which decides the count.")
        return 1.0

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Removes what lies at the level or under it."""
        for each in candidates:
            if self.quantile is not None:
                remove_lowest([each], round(fraction * self.quantile * each.size))
                continue
            remove_up_to(each, each.round(fraction * self._level(each)))

    def _level(self, candidates: Candidates) -> float:
        if self.value is not None:
            return self.value
        if self.mean is not None:
            return self.mean * float(candidates.scores()[candidates.kept].mean())
        assert self.std is not None
        return self.std * candidates.deviation()


@dataclass(frozen=True, repr=False)
class NofM(Selector):
    """At most ``n`` of every ``m`` consecutive inputs of a weight stay: 2:4 is what sparse tensor cores run.

    On the way there, the lowest of those that the pattern lets go are gone first, over all layers. Layers
    whose number of inputs ``m`` does not divide stay dense. Mishra et al. 2021, arXiv 2104.08378.

    Args:
        n: How many stay, above 0.
        m: Out of how many, above ``n``.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not is_integer(number):
                raise ValueError(f"{name}={number!r} must be an integer.")
        if not 0 < self.n < self.m:
            raise ValueError(f"n={self.n!r} must lie between 0 and m={self.m!r}.")

    def resolve(self, target: float | None) -> float:
        """``1 - n/m``; a target may repeat it."""
        share = 1 - self.n / self.m
        if target is not None and not (isinstance(target, float) and math.isclose(target, share)):
            raise ValueError(f"target={target!r} must be left out or be {share} for {self!r}.")
        return share

    def refuses(self, group: UnitGroup) -> str | None:
        """Groups without inputs to count, or whose number of inputs ``m`` does not divide."""
        if group.input_dim is None:
            return f"{self!r} needs single weights of a layer with inputs"
        inputs = group.shape[group.input_dim]
        return f"{inputs} inputs are no multiple of m={self.m}" if inputs % self.m else None

    def splits(self, group: UnitGroup) -> bool:
        """As long as each row has its inputs together."""
        return group.input_dim != 0

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Removes the lowest of those that are not among the best ``n`` of their ``m``; all at the end."""
        for each in candidates:
            best = self._best(each.scores(), cast(int, each.group.input_dim))
            if fraction == self.resolve(None):
                each.kept.logical_and_(best)
            else:
                each.shield(best)
        if fraction < self.resolve(None):
            remove_lowest(candidates, round(fraction * sum(each.size for each in candidates)))

    def _best(self, scores: Tensor, dim: int) -> Tensor:
        last = scores.movedim(dim, -1)
        blocks = last.reshape(*last.shape[:-1], last.shape[-1] // self.m, self.m)
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(blocks, dtype=torch.bool)
        best.scatter_(-1, order[..., : self.n], value=True)
        return best.flatten(-2).movedim(-1, dim)
