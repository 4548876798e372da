"""The state of a pruner: what it takes over, tells of its model while it prunes it, and saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_prune.channels.compaction.narrow_groups import CutIndices
from lightning_prune.channels.compaction.plan import PLAN, Plan
from lightning_prune.channels.latency.table import TABLE, LatencyTable
from lightning_prune.channels.latency.target import LATENCY_TARGET, LatencyTarget
from lightning_prune.core import schema
from lightning_prune.selectors.scoring import Scoring
from lightning_prune.selectors.targets import Quota
from lightning_prune.statistics.input_hooks import layer_inputs
from lightning_prune.statistics.observations import Observations
from lightning_prune.statistics.observer import ActivationObserver, Needs
from lightning_prune.statistics.sums import STATISTICS
from lightning_prune.units.given_masks import GivenMasks, MaskSource
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MASKS, MaskStore
from lightning_prune.units.shards import to_local
from lightning_prune.units.slices import axis_slices

_ENTRIES: dict[str, schema.Reader[Any]] = {
    "masks": MASKS,
    "plan": schema.none,
    "frozen": schema.mapping(schema.string),
    "protected": schema.sequence(schema.string),
    "left_out": schema.integer(),
    "unreconstructed": schema.mapping(schema.string),
    "criterion": schema.string,
    "statistics": schema.mapping(STATISTICS),
    "latency_table": schema.optional(schema.unchanged(TABLE)),
    "latency_target": schema.optional(schema.unchanged(LATENCY_TARGET)),
}
_BEFORE: dict[str, Any] = {  # early states lack them; "" is unknown
    "frozen": {},
    "criterion": "",
    "unreconstructed": {},
    "latency_table": None,
    "latency_target": None,
}
PRUNED = schema.record(_ENTRIES, before=_BEFORE)
# of a network that is cut between its events: masks have the shapes after the cut, statistics those before it
NARROW = schema.record(_ENTRIES | {"plan": PLAN})


class PrunedState:
    """Masks, sparsity, statistics and remarks: what a pruner takes over, tells of its model, and saves.

    Attributes:
        latency_table: The measured times of the network, for a budget in time; otherwise ``None``.
    """

    groups: tuple[UnitGroup, ...]
    frozen: dict[str, str]
    protected: set[str]
    unreconstructed: dict[str, str]
    store: MaskStore
    latency_table: LatencyTable | None = None
    _quotas: Sequence[Quota]
    _scoring: Scoring
    _given: dict[str, Tensor]
    _left_dense: dict[str, str]
    _reached: float

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
    def activations(self) -> ActivationObserver | None:
        """The observer of the inputs of layers in training steps; ``None`` if the criterion has none."""
        return self._scoring.criterion.activations

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

    @property
    def latency_target(self) -> LatencyTarget | None:
        """The target in measured time of the whole network, with what is left by the table, if there is one."""
        if self.latency_table is None or self._quotas[0].pattern is not None:
            return None
        budget = self._quotas[0].units.budgets["latency"]
        left = budget.cost(self._scoring.kept()) / budget.total
        return LatencyTarget.of(self.latency_table, self._quotas[0].share, left)

    @torch.no_grad()
    def keep_zeros(self) -> None:
        """Remove the units that are 0 now, unless a layer would keep too few, such as one of zeros alone."""
        for group in self.groups:
            here = group.here
            kept = here.sum(lambda weight: weight != 0, [part.weight for part in here.slices]) > 0
            if self._count(kept) >= group.least:
                self.store.keep(group, kept)

    @torch.no_grad()
    def load_masks(self, masks: GivenMasks | MaskSource) -> None:
        """Remove what masks from outside remove, besides what is removed already; :meth:`apply_` sets it to 0.

        Args:
            masks: The masks, as :class:`GivenMasks` describes them.

        Raises:
            ValueError: If they are none, one fits no parameter, or a layer would keep too few units; nothing
                has changed then.
        """
        given = (masks if isinstance(masks, GivenMasks) else GivenMasks(masks)).read(self._scoring.model)
        before = {name: to_local(self.masks[name]).clone() for name in self.masks.keys() & given.keys()}
        self.store.restrict(given)
        try:
            self._check_least()
        except ValueError:
            self.store.drop(given.keys() - before.keys())
            for name, mask in before.items():
                to_local(self.masks[name]).copy_(mask)
            raise
        self._given |= {name: mask & self._given.get(name, mask) for name, mask in given.items()}

    def _check_least(self) -> None:
        """Raise ValueError if given masks leave a layer too few units."""
        for group in self.groups:
            left = self._count(to_local(self._scoring.kept_of(group)))
            if left < group.least:
                units = f"{left} of {group.size} units of {group.name!r}"
                raise ValueError(f"masks leave {units}, of which at least {group.least} must stay.")

    def _count(self, units: Tensor) -> int:
        return int(self.store.shards.add_up(units.count_nonzero()))

    @property
    def narrow(self) -> bool:
        """Whether the model is cut at present."""
        return self.observations.narrow

    def narrow_(self, plan: Plan) -> None:
        """Observe the model as a plan has cut it. To prune it, take the cut back, and call :meth:`widen_`.

        Args:
            plan: The plan, which was applied to the model, and cuts units that are masked.
        """
        indices = CutIndices(plan)
        watches = Needs.ACTIVATION in self._scoring.criterion.needs
        found = [indices.narrow_group(group) for group in self.groups]
        layers = [(group, layer_inputs(self._scoring.model, group) if watches else []) for group, _ in found]
        self.observations.narrow_(layers, {group.name: units for group, units in found})

    def widen_(self) -> None:
        """Observe the whole model again, which is no longer cut."""
        self.observations.widen_()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics and :attr:`remarks`: plain values and tensors."""
        return {
            "masks": self.store.state_dict(),
            "plan": None,
            **self.remarks,
            **self.observations.state_dict(),
            "latency_table": None if self.latency_table is None else self.latency_table.to_state(),
            "latency_target": None if self.latency_target is None else asdict(self.latency_target),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load a saved state, and enforce its masks.

        Returns:
            What could not be loaded, in words: statistics of another criterion, or of other groups.

        Raises:
            ValueError: If it is not a pruner's state, or its masks are not of this model; nothing has changed
                then.
        """
        saved = schema.read(state, PRUNED, "the pruner's state")
        self.store.load_state_dict(saved["masks"])
        self.store.restrict(self._given)
        self.store.apply_()
        self._reached = 0.0
        self.protected |= set(saved["protected"])
        self.unreconstructed = dict(saved["unreconstructed"])
        own = {group.name for group in self.groups}
        self._left_dense = {name: reason for name, reason in saved["frozen"].items() if name in own}
        return self.observations.load_state_dict(saved)
