"""Which units of each group trials keep."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from lightning_prune.channels.compaction.plan import Kept
from lightning_prune.units.groups import UnitGroup


def uneven_cut(groups: Sequence[UnitGroup], *, other: bool = False) -> Kept:
    """Return for each group a random choice of units to keep, the same one each time for groups of its name.

    Shares lie between a quarter and three quarters, and differ from group to group: groups that have to keep
    equal numbers of units fail. Two units stay where there are three or more, and as many as a group keeps.

    Args:
        groups: The groups.
        other: Whether to keep another number, odd in place of even: one that has to be even fails.
    """
    kept = []
    for group in groups:
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
        ranks = torch.randperm(group.size, generator=generator).argsort()
        least, most = max(2, group.minimum), group.size - 1
        count, second = (
            min(max(least, round(group.size * share)), most)
            for share in (0.25 + 0.5 * torch.rand(2, generator=generator)).tolist()
        )
        if other and (count - second) % 2 == 0:
            count = max(group.minimum, second + 1 if second < most else second - 1)
        elif other:
            count = second
        kept.append((group, ranks < count))
    return kept


def least_cut(groups: Sequence[UnitGroup]) -> Kept:
    """Return for each group the choice to keep its first units, as few as it may keep."""
    return [(group, torch.arange(group.size) < group.minimum) for group in groups]
