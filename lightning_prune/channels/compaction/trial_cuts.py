"""Which units of each group trials keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.channels.compaction.plan import Kept
from lightning_prune.units.groups import UnitGroup


def uneven_cut(groups: Sequence[UnitGroup], *, other: bool = False) -> Kept:
    """Return for each group a random choice of units to keep, from a fixed seed.

    Shares lie between a quarter and three quarters, and differ from group to group: groups that have to keep
    equal numbers of units fail. Two units stay where there are three or more, and as many as a group keeps.

    Args:
        groups: The groups.
        other: Whether to keep one more or one less than otherwise: a number that has to be even fails.
    """
    generator = torch.Generator().manual_seed(0)
    kept = []
    for group in groups:
        ranks = torch.randperm(group.size, generator=generator).argsort()
        share = 0.25 + 0.5 * float(torch.rand((), generator=generator))
        count = min(max(2, group.minimum, round(group.size * share)), group.size - 1)
        if other:
            count = max(group.minimum, count + 1 if count + 1 < group.size else count - 1)
        kept.append((group, ranks < count))
    return kept


def least_cut(groups: Sequence[UnitGroup]) -> Kept:
    """Return for each group the choice to keep its first units, as few as it may keep."""
    return [(group, torch.arange(group.size) < group.minimum) for group in groups]
