"""Which units go: exact selection within a layer or over all of them, whatever their number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion
from lightning_prune.parts import Part
from lightning_prune.radix import boundary
from lightning_prune.statistics import Statistics
from lightning_prune.units import UnitGroup


class Candidates:
    """One group as a selector sees it: scores worked out piece by piece, and which units are still there.

    Args:
        group: The units.
        kept: Bool, of the units' shape, True where a unit is still there. Selection narrows it in place, so
            that it needs no memory of its own.
        criterion: Scores the units.
        statistics: What it has seen of them.
        dtype: Of all scores, float32 or float64.

    Attributes:
        removed: Units that are gone.
        protected: Whether the group would have been emptied, and keeps its best unit for that alone.
    """

    def __init__(
        self,
        group: UnitGroup,
        kept: Tensor,
        criterion: Criterion,
        statistics: Statistics,
        dtype: torch.dtype,
    ) -> None:
        self.group = group
        self.kept = kept
        self.removed = group.size - int(kept.count_nonzero())
        self.protected = False
        self._criterion = criterion
        self._statistics = statistics
        self._dtype = dtype
        self._ranges = criterion.pieces(group)
        self._below = torch.tensor(-math.inf, dtype=dtype, device=kept.device)
        self._above = -self._below
        self._shield: Tensor | None = None
        self._highest: float | None = None

    @property
    def size(self) -> int:
        """Units in all, removed ones included."""
        return self.group.size

    def pieces(self) -> Iterator[Tensor]:
        """The scores, rows after rows: -inf for removed units, inf for shielded ones.

        Raises:
            ValueError: If the criterion gives nan or inf.
        """
        highest = -math.inf
        for start, stop in self._ranges:
            score = self._criterion.score(self.group.rows(start, stop), self._statistics.rows(start, stop)).to(
                self._dtype
            )
            if self._highest is None:
                self._check(score)
            if self._shield is not None:
                score = torch.where(self._shield[start:stop], self._above, score)
            if self.removed:
                score = torch.where(self.kept[start:stop], score, self._below)
            if self._highest is None:
                highest = max(highest, float(score.max()))
            yield score
        self._highest = highest if self._highest is None else self._highest

    def _check(self, score: Tensor) -> None:
        low, high = (float(value) for value in score.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"{self._criterion!r} must give finite scores; in {self.group.name!r} they run from {low} to"
                f" {high}."
            )

    def scores(self) -> Tensor:
        """All scores at once, of the units' shape."""
        return torch.cat(list(self.pieces()))

    def deviation(self) -> float:
        """Standard deviation of what is still there, as the criterion defines it."""
        return self._criterion.deviation(self.group, self.scores(), self.kept)

    def shield(self, units: Tensor) -> None:
        """Puts units out of reach, given as a bool tensor of the units' shape."""
        self._shield = units

    def protect(self) -> None:
        """Puts the best unit out of reach, the earliest of equals."""
        best = torch.unravel_index(self.scores().argmax(), self.group.shape)
        self._shield = torch.zeros_like(self.kept)
        self._shield[best] = True

    def survives(self, level: float) -> bool:
        """Whether some unit scores above ``level``, or is out of reach."""
        if self._highest is None:
            for _ in self.pieces():
                pass
        return self._shield is not None or cast(float, self._highest) > level

    def round(self, level: float) -> float:
        """A level as the scores can express it, so that all comparisons with them agree."""
        return float(torch.tensor(level, dtype=self._dtype))

    def cut(self, level: float, ties: int = 0) -> int:
        """Removes what scores up to ``level``, but for the first ``ties`` units that score just that.

        Returns:
            How many of ``ties`` are left over, for the groups that follow.
        """
        for (start, stop), piece in zip(self._ranges, self.pieces(), strict=True):
            kept = self.kept[start:stop]
            torch.gt(piece, level, out=kept)
            if ties:
                equal = (piece == level).nonzero()[:ties]
                kept[tuple(equal.T)] = True
                ties -= len(equal)
        return ties


def remove_lowest(candidates: Sequence[Candidates], count: int) -> None:
    """Removes the ``count`` units that score lowest over all groups; what is gone already counts.

    Exact: ties keep the earlier unit. No group is emptied: it keeps its best unit, and others go instead
    as long as there are any.
    """
    possible = sum(each.size - 1 for each in candidates)
    bound = list(candidates) if count > possible else []
    count = min(count, possible)
    if count > sum(each.removed for each in candidates):
        while True:
            edge = boundary(lambda: (piece for each in candidates for piece in each.pieces()), count)
            emptied = [each for each in candidates if not each.survives(edge.value)]
            if not emptied:
                break
            for each in emptied:
                each.protect()
            bound += emptied
        ties = edge.below + edge.ties - count
        for each in candidates:
            ties = each.cut(edge.value, ties)
    for each in bound:
        each.protected = int(each.kept.count_nonzero()) == 1


class Selector(Part, ABC):
    """Which units go, given their scores."""

    @abstractmethod
    def resolve(self, target: float | None) -> float:
        """The share of units that is to be gone at the end, or of the selector's own rule to be in force.

        Raises:
            ValueError: If the selector cannot work with this target.
        """

    @abstractmethod
    def select(self, candidates: Sequence[Candidates], fraction: float) -> None:
        """Narrows what each candidate keeps.

        Args:
            candidates: All groups that can be scored now.
            fraction: The schedule's present share of what ``resolve`` gave, above 0.
        """

    def refuses(self, group: UnitGroup) -> str | None:
        """Why the selector can do nothing with a group, or ``None`` if it can."""
        return None


def _share(target: float | None, selector: Selector) -> float:
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
        raise ValueError(
            f"target={target!r} must be a number between 0 and 1 for {selector!r}: the share to be removed."
        )
    return float(target)


@dataclass(frozen=True, repr=False)
class Global(Selector):
    """The lowest scores of the whole network: ``round(target * units)`` of them, exactly.

    Layers end up with different shares, so scores must be comparable across layers. Rounding is to the
    nearest, half to even; ties keep the earlier unit. One radix search over all scores, without a sort.
    """

    def resolve(self, target: float | None) -> float:
        """The target itself, a number in (0, 1)."""
        return _share(target, self)

    def select(self, candidates: Sequence[Candidates], fraction: float) -> None:
        """Removes the lowest of all."""
        remove_lowest(candidates, round(fraction * sum(each.size for each in candidates)))


@dataclass(frozen=True, repr=False)
class PerLayer(Selector):
    """The lowest scores of each group: ``round(target * units)`` in every one, exactly."""

    def resolve(self, target: float | None) -> float:
        """The target itself, a number in (0, 1)."""
        return _share(target, self)

    def select(self, candidates: Sequence[Candidates], fraction: float) -> None:
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
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < limit:
            raise ValueError(f"{name}={number!r} must be a number above 0 and below {limit}.")

    def resolve(self, target: float | None) -> float:
        """The whole level; there is no target."""
        if target is not None:
            raise ValueError(f"target={target!r} must be None for {self!r}, which decides the count.")
        return 1.0

    def select(self, candidates: Sequence[Candidates], fraction: float) -> None:
        """Removes what lies at the level or under it."""
        for each in candidates:
            if self.quantile is not None:
                remove_lowest([each], round(fraction * self.quantile * each.size))
                continue
            level = each.round(fraction * self._level(each))
            if not each.survives(level):
                each.protect()
                each.protected = True
            each.cut(level)

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
            if isinstance(number, bool) or not isinstance(number, int):
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

    def select(self, candidates: Sequence[Candidates], fraction: float) -> None:
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
        blocks = last.reshape(*last.shape[:-1], -1, self.m)
        order = blocks.argsort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(blocks, dtype=torch.bool)
        best.scatter_(-1, order[..., : self.n], value=True)
        return best.flatten(-2).movedim(-1, dim)
