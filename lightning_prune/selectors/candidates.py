"""The view of one unit group that a selector gets: its scores, computed piece by piece, and its kept units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.radix import find_boundary, true_indices
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.shards import Shards, Unsharded

_SAMPLED, _BLOCK = 16, 64  # a sample has one of every _SAMPLED blocks of _BLOCK scores


class Candidates:
    """One unit group at a pruning event: its scores, computed piece by piece, and the units that are kept.

    Where the units are divided among processes, scores and ``kept`` cover the units that this process holds,
    and numbers of units cover all processes.

    Args:
        group: The unit group.
        kept: Bool, True where a unit is kept; of the units' shape, or of the shape of those that this process
            holds. Selection changes it in place, and needs a temporary copy only if units are removed already.
        criterion: Scores the units.
        statistics: The criterion's running sums for the group.
        dtype: Data type of all scores, float32 or float64.
        shards: The processes among which the units are divided.

    Attributes:
        removed: Number of units that were removed before this event.
        protected: Whether more would have been removed, and the group keeps its best units for that reason.
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
        # the criterion's own, computed once: those of units of several weights take little memory
        self._scores: Tensor | None = None
        self._below = torch.tensor(-math.inf, dtype=dtype, device=kept.device)
        self._shield: Tensor | None = None
        self._highest: float | None = None
        self._scale: float | None = None
        self._price: float | None = None
        self._charge: float | None = None
        self._factors: Tensor | None = None
        # after a sweep: flat indices and scores within the bracket, one pair for each piece
        self._bracketed: list[tuple[Tensor, Tensor]] | None = None
        self._before: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of units, removed ones included."""
        return self.group.size

    @property
    def left(self) -> int:
        """Number of units that are still kept."""
        return int(self.shards.add_up(self.kept.count_nonzero()))

    def pieces(self) -> Iterator[Tensor]:
        """Yield the scores, one range of rows after the other: -inf for removed units, inf for shielded ones.

        They are not to be written to.

        Raises:
            ValueError: If a score of the criterion is nan or infinite.
        """
        ends = self._below.expand(2)  # the maxima of the negated scores and of the scores
        for start, stop in self._ranges:
            score = self._score(start, stop)
            if self._highest is None and score.numel():
                low, high = score.aminmax()
                ends = torch.maximum(ends, torch.stack([-low, high]))
            if self._shield is not None:
                score = score.masked_fill(self._shield[start:stop], math.inf)
            yield score
        if self._highest is None:
            self._highest = self._top(ends)

    def sample(self) -> Iterator[Tensor]:
        """Yield a sample of the scores, spread over the group; shielded units have their own scores here."""
        if self._criterion.pointwise and self.group.divisible:
            group, statistics = self._here.view(_sample_blocks), self._statistics.view(_sample_blocks)
            yield self._adjusted(self._own(group, statistics), _sample_blocks)
        else:
            yield self._score(0, self._here.shape[0])

    def _score(self, start: int, stop: int) -> Tensor:
        if self.group.divisible:
            own = self._own(self._here.rows(start, stop), self._statistics.rows(start, stop))
        else:
            if self._scores is None:
                self._scores = self._own(self._here, self._statistics)
            own = self._scores[start:stop]
        return self._adjusted(own, lambda units: units[start:stop])

    def _own(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        return self._criterion.score(group, statistics).to(self._dtype)

    def _adjusted(self, score: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the adjusted scores of a part of the units, which ``part`` selects from a tensor of all."""
        if self._factors is not None:
            score = score * part(self._factors)
        if self._scale is not None:
            score = score / self._scale
        if self._charge is not None:
            score = score - self._charge
        if self._price is not None:
            score = torch.where(score < 0, score * self._price, score / self._price)
        return torch.where(part(self.kept), score, self._below) if self.removed else score

    def _top(self, ends: Tensor) -> float:
        """Return the highest score over all processes, or raise in all of them if a score is not finite."""
        negated_low, high = cast(list[float], self.shards.maximum(ends).tolist())
        if not high < math.inf or (negated_low == math.inf and not self.removed):
            raise ValueError(
                f"{self._criterion!r} must give finite scores; in {self.group.name!r} they run from"
                f" {-negated_low} to {high}."
            )
        return high

    def scores(self) -> Tensor:
        """Return all scores as one tensor of the units' shape."""
        return torch.cat(list(self.pieces()))

    def deviation(self) -> float:
        """Return the standard deviation of the kept units, as the criterion defines it."""
        return self._criterion.deviation(self.group, self.scores(), self.kept)

    def disturb(self, factors: Tensor) -> None:
        """Drop all adjustments of the scores, and multiply the criterion's scores by factors.

        Args:
            factors: Numbers above 0, of the units' shape.
        """
        self._factors = factors
        self._scale = self._charge = self._price = self._highest = None

    def divide(self, by: float) -> None:
        """Divide all scores by a number above 0."""
        self._scale = by
        self._highest = None

    def charge(self, amount: float) -> None:
        """Subtract a number from all scores, after the division."""
        self._charge = amount
        self._highest = None

    def weigh(self, price: float) -> None:
        """Weigh all scores by the cost that one unit saves, so that a higher price lowers the score.

        Args:
            price: The cost, above 0. Positive scores are divided by it, negative scores multiplied.
        """
        self._price = price
        self._highest = None

    def shield(self, units: Tensor) -> None:
        """Exclude units from removal.

        Args:
            units: Bool, of the units' shape, True for the units to exclude; removed ones are ignored.
        """
        self._shield = units & self.kept

    def protect(self) -> None:
        """Shield the best units, as many as the group must keep; of equal scores the earlier."""
        # of a mask that was loaded fewer may be left, which are all shielded
        self._shield = self._best(self.scores(), self.group.least) & self.kept

    def survives(self, level: float) -> bool:
        """Return whether as many units as the group must keep score above ``level`` or are shielded."""
        if self._shield is not None:
            return True
        if self.group.least > 1:
            return int(self.shards.add_up((self.scores() > level).count_nonzero())) >= self.group.least
        if self._highest is None:
            for _ in self.pieces():
                pass
        return cast(float, self._highest) > level

    def settle(self, before: Tensor) -> None:
        """Change the number of kept units to the nearest allowed width.

        Args:
            before: The units that were kept before the selection; the best of them stay.
        """
        self.resize(before, self.group.width(self.left))

    def resize(self, before: Tensor, width: int) -> None:
        """Keep the best units of those that were kept before, as many as ``width``."""
        self.kept.copy_(before)
        self.kept.logical_and_(self._best(self.scores(), width))

    def _best(self, scores: Tensor, count: int) -> Tensor:
        """Return a bool mask of the ``count`` highest scores; of equal scores the earlier."""
        best = torch.zeros_like(self.kept)
        if count > 1:  # only where one process holds all units
            edge = find_boundary(lambda: [-scores], count)
            _keep_above(scores, -edge.value, count - edge.below, best)
        elif self.shards.has_first_maximum(scores.max() if scores.numel() else self._below):
            best[torch.unravel_index(scores.argmax(), best.shape)] = True  # the earliest of equal scores
        return best

    def restart(self, kept: Tensor) -> None:
        """Undo removals and protection.

        Args:
            kept: The units that were kept before the selection.
        """
        self.kept.copy_(kept)
        self.protected = False
        self._shield = None

    def round(self, level: float) -> float:
        """Return a level rounded to the data type of the scores, so that all comparisons with them agree."""
        return float(torch.tensor(level, dtype=self._dtype))

    def sweep(self, low: float, high: float) -> tuple[int, Tensor]:
        """Remove the units that score below a bracket and store the scores within it, in one pass.

        Args:
            low: The lowest score of the bracket.
            high: The highest score of the bracket.

        Returns:
            The number of scores below the bracket, removed units included, and the scores within it, of the
            units that this process holds.
        """
        low = max(low, torch.finfo(self._dtype).min)  # so that the -inf of removed units lies below the bracket
        self._before = self.kept.clone() if self.removed else None
        self._bracketed = []
        left = 0
        for (start, stop), piece in zip(self._ranges, self.pieces(), strict=True):
            kept = self.kept[start:stop]
            torch.ge(piece, low, out=kept)
            left += int(kept.count_nonzero())
            indices = true_indices((piece <= high).logical_and_(kept).flatten())
            self._bracketed.append((indices, piece.take(indices)))
        return self.kept.numel() - left, torch.cat([scores for _, scores in self._bracketed])

    def restore(self) -> None:
        """Undo a sweep, if there was one."""
        if self._bracketed is not None:
            self.kept.copy_(torch.ones_like(self.kept) if self._before is None else self._before)
            self._bracketed = self._before = None

    def tied(self, level: float) -> int:
        """Return how many units of this process score exactly ``level``.

        After a sweep, ``level`` must lie in its bracket.
        """
        pieces = self.pieces() if self._bracketed is None else (scores for _, scores in self._bracketed)
        return sum(int((scores == level).count_nonzero()) for scores in pieces)

    def cut(self, level: float, ties: int = 0) -> None:
        """Remove the units that score at most ``level``, but keep some that score exactly ``level``.

        Args:
            level: A score; after a sweep one within its bracket.
            ties: How many of the units of this process that score exactly ``level`` stay: the first ones.
        """
        if self._bracketed is None:
            for (start, stop), piece in zip(self._ranges, self.pieces(), strict=True):
                ties = _keep_above(piece, level, ties, self.kept[start:stop])
            return
        for (start, stop), (indices, scores) in zip(self._ranges, self._bracketed, strict=True):
            stays = torch.empty_like(scores, dtype=torch.bool)
            ties = _keep_above(scores, level, ties, stays)
            rows = self.kept[start:stop]
            rows[torch.unravel_index(indices, rows.shape)] = stays
        self._bracketed = self._before = None


def _keep_above(scores: Tensor, level: float, ties: int, kept: Tensor) -> int:
    """Set ``kept`` to True for scores above ``level`` and the first ``ties`` equal to it, else to False.

    Returns:
        The number of ties that are left for later scores.
    """
    torch.gt(scores, level, out=kept)
    if ties:
        equal = (scores == level).nonzero()[:ties]
        kept[tuple(equal.T)] = True
        ties -= len(equal)
    return ties


def _sample_blocks(tensor: Tensor) -> Tensor:
    """Return evenly spaced blocks of a tensor, which are faster to read than single elements."""
    flat = tensor.flatten()
    return flat.unfold(0, min(_BLOCK, len(flat)), _BLOCK * _SAMPLED)
