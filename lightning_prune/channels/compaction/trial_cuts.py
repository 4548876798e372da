"""Which units of each group trials keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from zlib import crc32

import torch

from lightning_prune.channels.compaction.plan import Kept
from lightning_prune.units.groups import UnitGroup


def uneven_cut(groups: Sequence[UnitGroup], *, other: bool = False) -> Kept:
    """Return for each group a random choice of units to keep.

    The choice follows from the name of the first weight that makes the units, and from their number, whatever
    the other groups are, so that the errors of two trials can be compared. Shares lie between a quarter and
    three quarters, and differ from weight to weight: groups that have to keep equal numbers of units fail. Two
    units stay where there are three or more, and as many as a group keeps.

    Args:
        groups: The groups.
        other: Whether to keep another number of units than otherwise: a number that has to be even fails.
            Groups of equal size then keep different numbers, as far as there are so many.
    """
    used: Counter[tuple[int, int]] = Counter()
    kept = []
    for group in groups:
        generator = torch.Generator().manual_seed(crc32(group.slices[0].name.encode()))
        ranks = torch.randperm(group.size, generator=generator).argsort()
        share = 0.25 + 0.5 * float(torch.rand((), generator=generator))
        count = max(group.minimum, min(max(2, round(group.size * share)), group.size - 1))
        if other:
            count = min(_other_counts(group, count), key=lambda each: used[group.size, each])
            used[group.size, count] += 1
        kept.append((group, ranks < count))
    return kept


def _other_counts(group: UnitGroup, count: int) -> list[int]:
    """Return the numbers of units that a group may keep, those first that are an odd number from this one."""
    allowed = range(group.minimum, group.size) or [count]
    return sorted(allowed, key=lambda each: ((each - count) % 2 == 0, abs(each - count), -each))


def least_cut(groups: Sequence[UnitGroup]) -> Kept:
    """Return for each group the choice to keep its first units, as few as it may keep."""
    return [(group, torch.arange(group.size) < group.minimum) for group in groups]
