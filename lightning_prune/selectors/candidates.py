"""One group as a selector sees it: its scores, piece by piece, and which units are still there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from lightning_prune.criteria import Criterion
from lightning_prune.selectors.radix import true_indices
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.shards import Shards, Unsharded

_SAMPLED, _BLOCK = 16, 64  # a sample is one of so many blocks, of so many scores


class Candidates:
    """One group as a selector sees it: scores worked out piece by piece, and which units are still there.

    Args:
        group: The units.
        kept: Bool, True where a unit is still there: of the units' shape, or of those that this process holds.
            Selection narrows it in place, and keeps a copy meanwhile only where units are gone already.
        criterion: Scores the units.
        statistics: What it has seen of them.
        dtype: Of all scores, float32 or float64.
        shards: Among which the units are divided. Scores and what is kept are of those held here, numbers of
            units are of all.

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
        shards: Shards = Unsharded(),
    ) -> None:
        self.group = group
        self.kept = kept
        self.shards = shards
        self.removed = group.size - self.left
        self.protected = False
        self._criterion = criterion
        self._statistics = statistics
        self._dtype = dtype
        self._here = group.here
        self._ranges = criterion.pieces(self._here)
        self._below = torch.tensor(-math.inf, dtype=dtype, device=kept.device)
        self._above = -self._below
        self._shield: Tensor | None = None
        self._highest: float | None = None
        self._scale: float | None = None
        self._price: float | None = None
        self._charge: float | None = None
        self._factors: Tensor | None = None
        self._close: list[tuple[Tensor, Tensor]] | None = None  # places and scores, of each piece
        self._before: Tensor | None = None

    @property
    def size(self) -> int:
        """Units in all, removed ones included."""
        return self.group.size

    @property
    def left(self) -> int:
        """Units that are still there."""
        return int(self.shards.add_up(self.kept.count_nonzero()))

    def pieces(self) -> Iterator[Tensor]:
        """The scores, rows after rows: -inf for removed units, inf for shielded ones.

        Raises:
            ValueError: If the criterion gives nan or inf.
        """
        ends = self._below.expand(2)  # of minus the scores, and of the scores
        for start, stop in self._ranges:
            score = self._score(start, stop)
            if self._highest is None and score.numel():
                low, high = score.aminmax()
                ends = torch.maximum(ends, torch.stack([-low, high]))
            if self._shield is not None:
                score = torch.where(self._shield[start:stop], self._above, score)
            yield score
        if self._highest is None:
            self._highest = self._top(ends)

    def sample(self) -> Iterator[Tensor]:
        """Some of the scores, spread over the group; shields are not seen."""
        if self._criterion.pointwise and self.group.divisible:
            yield self._seen(
                self._here.view(_sample_blocks), self._statistics.view(_sample_blocks), _sample_blocks
            )
        else:
            yield self._score(0, self._here.shape[0])

    def _score(self, start: int, stop: int) -> Tensor:
        rows, statistics = self._here.rows(start, stop), self._statistics.rows(start, stop)
        return self._seen(rows, statistics, lambda units: units[start:stop])

    def _seen(self, group: UnitGroup, statistics: Statistics, look: Callable[[Tensor], Tensor]) -> Tensor:
        score = self._criterion.score(group, statistics).to(self._dtype)
        if self._factors is not None:
            score = score * look(self._factors)
        if self._scale is not None:
            score = score / self._scale
        if self._charge is not None:
            score = score - self._charge
        if self._price is not None:
            score = torch.where(score < 0, score * self._price, score / self._price)
        return torch.where(look(self.kept), score, self._below) if self.removed else score

    def _top(self, ends: Tensor) -> float:
        """The highest score of all; all processes raise, or none."""
        fall, high = cast(list[float], self.shards.highest(ends).tolist())
        if not high < math.inf or (fall == math.inf and not self.removed):
            raise ValueError(
                f"{self._criterion!r} must give finite scores; in {self.group.name!r} they run from {-fall} to"
                f" {high}."
            )
        return high

    def scores(self) -> Tensor:
        """All scores at once, of the units' shape."""
        return torch.cat(list(self.pieces()))

    def deviation(self) -> float:
        """Standard deviation of what is still there, as the criterion defines it."""
        return self._criterion.deviation(self.group, self.scores(), self.kept)

    def disturb(self, factors: Tensor) -> None:
        """Starts anew from the criterion's scores times these numbers above 0, of the units' shape."""
        self._factors = factors
        self._scale = self._charge = self._price = self._highest = None

    def divide(self, by: float) -> None:
        """Divides all scores by a number above 0."""
        self._scale = by
        self._highest = None

    def charge(self, amount: float) -> None:
        """Takes a number from all scores, after they are divided."""
        self._charge = amount
        self._highest = None

    def weigh(self, price: float) -> None:
        """Compares by what a unit saves, a number above 0: what saves much scores less, above 0 and below."""
        self._price = price
        self._highest = None

    def shield(self, units: Tensor) -> None:
        """Puts units that are still there out of reach, given as a bool tensor of the units' shape."""
        self._shield = units & self.kept

    def protect(self) -> None:
        """Puts the best units out of reach, as many as have to stay, the earliest of equals."""
        self._shield = self._best(self.scores(), self.group.least)

    def survives(self, level: float) -> bool:
        """Whether enough units score above ``level``, or are out of reach."""
        if self._shield is not None:
            return True
        if self.group.least > 1:
            return int(self.shards.add_up((self.scores() > level).count_nonzero())) >= self.group.least
        if self._highest is None:
            for _ in self.pieces():
                pass
        return cast(float, self._highest) > level

    def settle(self, before: Tensor) -> None:
        """Brings the number of units that stay to one that may: the best of those that were there before."""
        width = self.group.width(self.left)
        self.kept.copy_(before)
        self.kept.copy_(self._best(self.scores(), width))

    def _best(self, scores: Tensor, count: int) -> Tensor:
        best = torch.zeros_like(self.kept)
        if count > 1:  # of channels, which one process holds
            order = scores.flatten().argsort(descending=True, stable=True)[:count]
            best[torch.unravel_index(order, best.shape)] = True
        elif self.shards.leads(scores.max() if scores.numel() else self._below):
            best[torch.unravel_index(scores.argmax(), best.shape)] = True  # the earliest of equals
        return best

    def restart(self, kept: Tensor) -> None:
        """Takes back what was removed and protected.

        Args:
            kept: Which units were there at first.
        """
        self.kept.copy_(kept)
        self.protected = False
        self._shield = None

    def round(self, level: float) -> float:
        """A level as the scores can express it, so that all comparisons with them agree."""
        return float(torch.tensor(level, dtype=self._dtype))

    def sweep(self, low: float, high: float) -> tuple[int, Tensor]:
        """Removes what scores below a bracket, and remembers what lies within: one look at each score.

        Returns:
            How many score below, and the scores within, of those held here.
        """
        low = max(low, torch.finfo(self._dtype).min)  # what is gone already stays below
        self._before = self.kept.clone() if self.removed else None
        self._close = []
        left = 0
        for (start, stop), piece in zip(self._ranges, self.pieces(), strict=True):
            kept = self.kept[start:stop]
            torch.ge(piece, low, out=kept)
            left += int(kept.count_nonzero())
            close = true_indices((piece <= high).logical_and_(kept).flatten())
            self._close.append((close, piece.take(close)))
        return self.kept.numel() - left, torch.cat([scores for _, scores in self._close])

    def restore(self) -> None:
        """Takes a sweep back."""
        if self._close is not None:
            self.kept.copy_(torch.ones_like(self.kept) if self._before is None else self._before)
            self._close = self._before = None

    def tied(self, level: float) -> int:
        """How many of the units held here score just ``level``; after a sweep it must lie in its bracket."""
        near = self.pieces() if self._close is None else (scores for _, scores in self._close)
        return sum(int((scores == level).count_nonzero()) for scores in near)

    def cut(self, level: float, ties: int = 0) -> None:
        """Removes what scores up to ``level``, but for the first ``ties`` units here that score just that.

        After a sweep, ``level`` must lie in its bracket.
        """
        if self._close is None:
            for (start, stop), piece in zip(self._ranges, self.pieces(), strict=True):
                ties = _keep_above(piece, level, ties, self.kept[start:stop])
            return
        for (start, stop), (close, scores) in zip(self._ranges, self._close, strict=True):
            stays = torch.empty_like(scores, dtype=torch.bool)
            ties = _keep_above(scores, level, ties, stays)
            rows = self.kept[start:stop]
            rows[torch.unravel_index(close, rows.shape)] = stays
        self._close = self._before = None


def _keep_above(scores: Tensor, level: float, ties: int, kept: Tensor) -> int:
    torch.gt(scores, level, out=kept)
    if ties:
        equal = (scores == level).nonzero()[:ties]
        kept[tuple(equal.T)] = True
        ties -= len(equal)
    return ties


def _sample_blocks(tensor: Tensor) -> Tensor:
    """Blocks of it: reading them costs less than single elements would, and they come from all over."""
    flat = tensor.flatten()
    return flat.unfold(0, min(_BLOCK, len(flat)), _BLOCK * _SAMPLED)
