"""One group as a selector sees it, and the exact removal of what scores lowest over several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion
from lightning_prune.radix import boundary
from lightning_prune.statistics import Statistics
from lightning_prune.units import UnitGroup

_SAMPLED, _BLOCK = 16, 64  # a sample is one of so many blocks, of so many scores


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
            score = self._score(start, stop)
            if self._highest is None:
                highest = max(highest, self._top(score))
            if self._shield is not None:
                score = torch.where(self._shield[start:stop], self._above, score)
            yield score
        self._highest = highest if self._highest is None else self._highest

    def sample(self) -> Iterator[Tensor]:
        """Some of the scores, spread over the group; shields are not seen."""
        if self._criterion.pointwise and self.group.divisible:
            yield self._masked(self.group.view(_thin), self._statistics.view(_thin), _thin(self.kept))
        else:
            yield self._score(0, self.group.shape[0])

    def _score(self, start: int, stop: int) -> Tensor:
        rows, statistics = self.group.rows(start, stop), self._statistics.rows(start, stop)
        return self._masked(rows, statistics, self.kept[start:stop])

    def _masked(self, group: UnitGroup, statistics: Statistics, kept: Tensor) -> Tensor:
        score = self._criterion.score(group, statistics).to(self._dtype)
        return torch.where(kept, score, self._below) if self.removed else score

    def _top(self, score: Tensor) -> float:
        low, high = (float(value) for value in score.aminmax())
        if not high < math.inf or (low == -math.inf and not self.removed):
            raise ValueError(
                f"{self._criterion!r} must give finite scores; in {self.group.name!r} they run from {low} to"
                f" {high}."
            )
        return high

    def scores(self) -> Tensor:
        """All scores at once, of the units' shape."""
        return torch.cat(list(self.pieces()))

    def deviation(self) -> float:
        """Standard deviation of what is still there, as the criterion defines it."""
        return self._criterion.deviation(self.group, self.scores(), self.kept)

    def shield(self, units: Tensor) -> None:
        """Puts units that are still there out of reach, given as a bool tensor of the units' shape."""
        self._shield = units & self.kept

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


def _thin(tensor: Tensor) -> Tensor:
    """Blocks of it: reading them costs less than single elements would, and they come from all over."""
    flat = tensor.flatten()
    return flat.unfold(0, min(_BLOCK, len(flat)), _BLOCK * _SAMPLED)


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
            edge = boundary(
                lambda: (piece for each in candidates for piece in each.pieces()),
                count,
                sum(each.size for each in candidates),
                lambda: (piece for each in candidates for piece in each.sample()),
            )
            if edge.value == -math.inf:
                raise ValueError("a criterion must give finite scores; some are -inf.")
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
