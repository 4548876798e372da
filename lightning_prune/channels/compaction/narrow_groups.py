"""Unit groups of a network that a plan has cut: the units that are left, at their new places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_prune.channels.compaction.plan import Plan
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice, axis_slices


class CutIndices:
    """The indices that a plan leaves along the dimensions of tensors.

    Args:
        plan: The plan, which has been applied to the tensors.
    """

    def __init__(self, plan: Plan) -> None:
        self._kept = {(cut.name, cut.dim): torch.tensor(cut.kept, dtype=torch.int64) for cut in plan.cuts}

    def of(self, part: AxisSlice) -> Tensor:
        """Return the indices that are left along the dimension of a slice, in ascending order."""
        kept = self._kept.get((part.name, part.dim))
        return torch.arange(part.weight.shape[part.dim]) if kept is None else kept

    def narrow_group(self, group: UnitGroup) -> tuple[UnitGroup, Tensor]:
        """Return a group without the units that were cut.

        Args:
            group: The group of the network before the cut, of units along dimensions of its tensors.

        Returns:
            The group to observe in the network after it, and the number that each of its units had before.
        """
        units = torch.cat([part.units_left(self.of(part)) for part in axis_slices(group.slices)]).unique()

        def left(parts: Sequence[AxisSlice]) -> tuple[AxisSlice, ...]:
            held = ((part, self.of(part)) for part in parts)
            return tuple(part.narrowed(kept, units) for part, kept in held if len(part.units_left(kept)))

        slices, followers = left(axis_slices(group.slices)), left(axis_slices(group.followers))
        return replace(group, slices=slices, followers=followers, buffers=()), units
