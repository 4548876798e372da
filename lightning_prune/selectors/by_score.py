"""Selectors that go by the scores alone: globally, per layer, up to a threshold, or n of every m inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.parts import LATER, is_integer, is_number
from lightning_prune.selectors.base import Costs, Selector
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import give_back, remove_lowest, remove_to_cost, remove_up_to
from lightning_prune.selectors.timing import check_timing, timed_units
from lightning_prune.units.groups import UNKNOWN_INPUTS, UnitGroup, Units, listed_by_reason
from lightning_prune.units.slices import axis_slices

_BUDGETS = ("units", "params", "macs", "latency")
_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda scores: scores.norm(),
    "mean": lambda scores: scores.abs().mean(),
    "max": lambda scores: scores.abs().max(),
}
_LEAST_PRICE = 1e-15  # as a share of the network's cost; units that save nothing are removed last


@dataclass(frozen=True, repr=False)
class Global(Selector):
    """Removes the lowest-scoring units of the whole network: exactly ``round(target * units)`` of them.

    Layers end up with different shares, so scores must be comparable across layers. Rounding is to the
    nearest, half to even; of units with equal scores the earlier stays. The units are found by one radix search
    over all scores, without a sort.

    Args:
        budget: The quantity that the target is a share of: the "units" that may be removed, or the "params",
            the "macs" or the "latency", the measured time, of the whole network, frozen layers included. Such a
            target is met as nearly as whole units allow. Coupling is counted: a channel costs in the layers
            that produce it and in the layers that read it. Where targets are given by pattern, it is the cost
            of the weights, products or layers that the units of one pattern shorten, as if all other units
            stayed.
        normalize: The number that the scores of a group are divided by before groups are compared: ``None`` for
            no division, the "l2" norm of the scores (Molchanov et al. 2016, arXiv 1611.06440), their "mean" or
            "max" absolute value, or the "cost" of one unit in the budget at the present widths (negative scores
            are multiplied by it). With scores that are changes of the loss, such as those of ``Taylor``, "cost"
            is the greedy solution of the knapsack problem: the least loss for the cost saved. "cost" is ours.
        cost_weight: Factor of a cost term. After normalization each score is reduced by ``cost_weight`` times
            the share of the network's budget that one unit saves at the present widths (Molchanov et al. 2016,
            who count in billions of multiply-adds and choose 1e-3).
        most: The largest share of a layer's units that may be removed, in (0, 1]: ``floor(most * units)`` of
            them, and never all. What a layer does not lose, others do, so that the target is met.
        batch: For "latency": the batch size whose time is measured; by default that of ``table``, or 1.
        table: For "latency": the times of the layers by width, as a ``LatencyTable`` or the path of its file,
            such as ``lightning-prune latency`` writes on another machine; by default they are measured once on
            the device of the model, in a minute or two, and kept in checkpoints.

    Raises:
        ValueError: If an argument has none of these values, or a cost is needed and ``budget`` is "units"; when
            it meets the network, if the target is out of reach.
    """

    budget: Literal["units", "params", "macs", "latency"] = "units"
    normalize: Literal["l2", "mean", "max", "cost"] | None = None
    cost_weight: float = 0.0
    most: float = field(default=1.0, metadata=LATER)
    batch: int | None = field(default=None, metadata=LATER)
    # not LatencyTable: the command line would read the file in its place
    table: Any = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        for argument, known in (("budget", _BUDGETS), ("normalize", (None, *_NORMS, "cost"))):
            given = getattr(self, argument)
            if given not in known:
                raise ValueError(f"{argument}={given!r} must be one of {', '.join(map(repr, known))}.")
        if not is_number(self.cost_weight) or self.cost_weight < 0:
            raise ValueError(f"cost_weight={self.cost_weight!r} must be a finite number of at least 0.")
        if not is_number(self.most) or not 0 < self.most <= 1:
            raise ValueError(f"most={self.most!r} must be a number above 0, at most 1.")
        if self.budget == "units" and (self.normalize == "cost" or self.cost_weight > 0):
            given = "normalize='cost'" if self.normalize == "cost" else f"cost_weight={self.cost_weight!r}"
            raise ValueError(f"{given} needs budget='params' or budget='macs' or 'latency': all units cost 1.")
        check_timing(self.budget, self.batch, self.table)

    @property
    def needs_example(self) -> bool:
        """Whether the budget counts multiply-adds or time, which depend on the size of the input."""
        return self.budget in ("macs", "latency")

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason if the budget is time and the units are no channels: only their time is measured."""
        if self.budget == "latency" and (group.modules or group.numbered):
            return (
                f"{self!r} does not measure experts, whose time depends on where tokens go: take another budget"
            )
        if self.budget == "latency" and not axis_slices(group.slices):
            return f"zeros alone save no time, which {self!r} is to save: take Channels() or Heads()"
        return None

    def measured(self, units: Units, model: nn.Module, example: Any) -> tuple[Units, LatencyTable | None]:
        """Return the units with the budget "latency", and its table, if that is the budget."""
        if self.budget != "latency":
            return units, None
        return timed_units(units, model, example, self.batch, self.table)

    def with_table(self, table: LatencyTable) -> Global:
        """Return the selector with a table to take in place of its own, if the budget is time."""
        return replace(self, table=table) if self.budget == "latency" else self

    def check(self, share: float, units: Units) -> None:
        """Raise ValueError if the target is out of reach with the least number of units in every group."""
        reachable = self._reachable(share, units)
        if share > reachable:
            bound = Decimal(reachable).quantize(Decimal("0.0001"), ROUND_FLOOR)  # as a target it is in reach
            what = "the measured time" if self.budget == "latency" else f"all {self.budget}"
            raise ValueError(
                f"target={share!r} of {what} is out of reach: {bound} are, if each layer"
                f" keeps its least. {listed_by_reason(units.frozen)}".rstrip()
            )

    def _reachable(self, share: float, units: Units) -> float:
        """Return the share that is gone with the least number of units in every group.

        Of units it may be less than the target, but for ``most``: a layer that would be emptied keeps its last.
        """
        if self.budget == "units":
            total = sum(group.size for group in units.groups)
            reachable = sum(group.size - group.least for group in units.groups)
            return reachable / total if self.most < 1 and round(share * total) > reachable else 1.0
        budget = units.budgets.get(self.budget)
        if budget is None:
            raise ValueError(f"budget={self.budget!r} needs example=..., what forward is called with.")
        if budget.total == 0:
            raise ValueError(f"target={share!r} is a share of no {self.budget}: these units take none.")
        least = {group.name: torch.arange(group.size) < group.least for group in units.groups}
        return 1 - budget.cost(least) / budget.total

    def limited(self, group: UnitGroup) -> UnitGroup:
        """Return the group with what ``most`` leaves in it as its least number of units."""
        least = group.size - math.floor(Fraction(str(self.most)) * group.size)  # 0.29 of 100 are 29
        return replace(group, minimum=max(group.minimum, least))

    def splits(self, group: UnitGroup) -> bool:
        """Return whether no value of a whole group is needed: no cost, no normalization, no limit."""
        return self.budget == "units" and self.normalize is None and self.most == 1

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove the lowest-scoring units over all groups."""
        cost = partial(costs, self.budget)
        # hardware has steps: one unit may save nothing, and the next one much
        price = _price_of_all if self.budget == "latency" else _price
        if self.normalize == "cost":
            for each in candidates:
                each.weigh(price(each, cost))
        elif self.normalize is not None:
            for each in candidates:
                each.divide(float(_NORMS[self.normalize](each.scores()[each.kept])) or 1.0)
        if self.cost_weight > 0:
            for each in candidates:
                each.charge(self.cost_weight * price(each, cost))
        if self.budget == "units":
            remove_lowest(candidates, round(fraction * sum(each.size for each in candidates)))
            return
        before = [each.kept.clone() for each in candidates]
        remove_to_cost(candidates, cost, 1 - fraction)
        if self.budget == "latency":
            give_back(candidates, before, cost)


def _price(candidates: Candidates, cost: Callable[[], float]) -> float:
    """Return the cost of one kept unit, taken as that of each unit in the group; at least ``_LEAST_PRICE``."""
    kept = candidates.kept
    one = torch.unravel_index(kept.flatten().view(torch.uint8).argmax(), kept.shape)
    before = cost()
    kept[one] = False
    price = before - cost()
    kept[one] = True
    return max(price, _LEAST_PRICE)


def _price_of_all(candidates: Candidates, cost: Callable[[], float]) -> float:
    """Return the mean cost of the kept units that may go; at least ``_LEAST_PRICE``."""
    units, flat = candidates.left - candidates.group.least, candidates.kept.flatten()
    if units <= 0:
        return _LEAST_PRICE
    before, removed = cost(), flat.nonzero()[:units]
    candidates.kept.view(-1)[removed] = False
    price = (before - cost()) / units
    candidates.kept.view(-1)[removed] = True
    return max(price, _LEAST_PRICE)


@dataclass(frozen=True, repr=False)
class PerLayer(Selector):
    """Removes the lowest-scoring units of each group: exactly ``round(target * units)`` in every group."""

    def splits(self, group: UnitGroup) -> bool:
        """Return True: all groups can be divided."""
        return True

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove the lowest-scoring units of each group."""
        for each in candidates:
            remove_lowest([each], round(fraction * each.size))


@dataclass(frozen=True, repr=False)
class Threshold(Selector):
    """Removes all units that score at most a level, so that the scores decide the count. Needs ``target=None``.

    Give exactly one of the arguments. The schedule scales the level from 0 to its full value. The level is
    computed again at each event, from the units that are still kept. For scores that are not negative.

    Args:
        value: The level itself.
        quantile: The share of each layer's units to remove, in (0, 1).
        mean: The level of each layer as a multiple of its mean score.
        std: The level of each layer as a multiple of the standard deviation: of the weights with ``Magnitude``
            on single weights (Han et al. 2015), otherwise of the scores.

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
        """Return 1, the share of the level at the end; there is no target."""
        if target is not None:
            raise ValueError(f"target={target!r} must be None for {self!r}, which decides the count.")
        return 1.0

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove the units that score at most the level of their group."""
        for each in candidates:
            if self.quantile is not None:
                remove_lowest([each], round(fraction * self.quantile * each.size))
            else:
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
    """Keeps at most ``n`` of every ``m`` consecutive inputs of a weight; sparse tensor cores run 2:4.

    Before the end of the schedule, the lowest-scoring of the weights that the full pattern removes are removed,
    over all layers. Layers whose number of inputs is not a multiple of ``m`` stay dense. Mishra et al. 2021,
    arXiv 2104.08378.

    Args:
        n: Number of inputs kept in each block, above 0.
        m: Number of inputs in a block, above ``n``.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if not is_integer(number):
                raise ValueError(f"{name}={number!r} must be an integer.")
        if not 0 < self.n < self.m:
            raise ValueError(f"n={self.n!r} must be above 0 and below m={self.m!r}.")

    @property
    def pattern(self) -> tuple[int, int]:  # type: ignore[override]
        """The numbers n and m."""
        return self.n, self.m

    def resolve(self, target: float | None) -> float:
        """Return ``1 - n/m``; a target may be given only if it equals that."""
        share = 1 - self.n / self.m
        if target is not None and not (isinstance(target, float) and math.isclose(target, share)):
            raise ValueError(f"target={target!r} must be left out or be {share} for {self!r}.")
        return share

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason if a group has no input dimension, or its inputs are no multiple of ``m``."""
        if group.input_dim is None:
            if not group.divisible:
                return f"{self!r} needs single weights of a layer with inputs"
            return f"{UNKNOWN_INPUTS}, and {self!r} goes along inputs: Global() can prune it"
        inputs = group.shape[group.input_dim]
        return f"{inputs} inputs are no multiple of m={self.m}" if inputs % self.m else None

    def splits(self, group: UnitGroup) -> bool:
        """Return whether each process holds all inputs of its rows: rows are not the inputs."""
        return group.input_dim != 0

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove the lowest-scoring units outside the best ``n`` of their ``m``; at the end all of those."""
        at_end = fraction == self.resolve(None)
        for each in candidates:
            best = self._best(each.scores(), cast(int, each.group.input_dim))
            if at_end:
                each.kept.logical_and_(best)
            else:
                each.shield(best)
        if not at_end:
            remove_lowest(candidates, round(fraction * sum(each.size for each in candidates)))

    def _best(self, scores: Tensor, dim: int) -> Tensor:
        """Return a bool mask of the ``n`` highest of every ``m`` consecutive scores along ``dim``."""
        blocks = scores.movedim(dim, -1).unflatten(-1, (-1, self.m))
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(blocks, dtype=torch.bool)
        best.scatter_(-1, order[..., : self.n], value=True)
        return best.flatten(-2).movedim(-1, dim)
