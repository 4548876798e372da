"""What a pruner tells of its model while it prunes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune.selectors.scoring import Scoring
from lightning_prune.statistics.observations import Observations
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.slices import axis_slices


class PrunedState:
    """Masks, sparsity, statistics and remarks: what a pruner tells of its model."""

    groups: tuple[UnitGroup, ...]
    frozen: dict[str, str]
    protected: set[str]
    unreconstructed: dict[str, str]
    store: MaskStore
    _scoring: Scoring
    _left_dense: dict[str, str]

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool masks by parameter name, True where a weight is kept; live, not copies."""
        return self.store.masks

    @property
    def channel_groups(self) -> tuple[UnitGroup, ...] | None:
        """The groups, if compaction can remove their units; ``None`` for single weights and blocks."""
        return self.groups if all(axis_slices(group.slices) for group in self.groups) else None

    @property
    def sparsity(self) -> float:
        """Removed share, in [0, 1], of the elements that the structure covers."""
        return self.store.removed / sum(mask.numel() for mask in self.masks.values())

    @property
    def observations(self) -> Observations:
        """The criterion's running sums since the last event."""
        return self._scoring.observations

    @property
    def ready(self) -> bool:
        """Whether some group can be scored: criteria of gradients or activations must have observed a step."""
        return self.observations.ready

    @property
    def left_out(self) -> int:
        """Number of observations that were left out, because a gradient or an activation was inf or nan."""
        return self.observations.left_out

    @property
    def remarks(self) -> dict[str, Any]:
        """What stays and why, and the number of left-out observations, as plain values for a report."""
        return {
            "frozen": {**self.frozen, **self._left_dense},
            "protected": sorted(self.protected),
            "left_out": self.left_out,
            "unreconstructed": dict(self.unreconstructed),
        }
