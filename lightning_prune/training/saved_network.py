"""The saved state of a pruned network: dense, cut between its events, or compacted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.channels.compaction.plan import PLAN
from lightning_prune.channels.compaction.replay import expand_tensor
from lightning_prune.core import schema
from lightning_prune.report.report import REPORT
from lightning_prune.selectors.pruned_state import NARROW, PRUNED
from lightning_prune.units.masks import MASKS, pack, unpack

_COMPACTED = schema.record(
    {
        "masks": MASKS,
        "statistics": schema.mapping(schema.anything),
        "left_out": schema.integer(),
        "plan": PLAN,
        "report": REPORT,
    }
)


def read_pruned_network(state: Any) -> dict[str, Any]:
    """Return a saved network, checked: the state of a pruner, of a network that is cut, or a compacted one.

    Raises:
        ValueError: If it is none of these.
    """
    found = schema.mapping(schema.anything)(state)
    if is_compacted(found):
        return _COMPACTED(state)
    return (PRUNED if found.get("plan") is None else NARROW)(state)


def is_compacted(state: Mapping[str, Any]) -> bool:
    """Return whether a saved network was compacted, so that nothing more of it is pruned."""
    return state.get("plan") is not None and "report" in state


def state_of_dense(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a pruner's saved state, with masks of the dense network in place of those after a cut."""
    plan = state["plan"]
    if plan is None:
        return state
    masks = {}
    for name, entry in state["masks"].items():
        mask = expand_tensor(unpack(entry["bits"], tuple(entry["shape"])), plan.cuts_of(name))
        masks[name] = {"bits": pack(mask), "shape": list(mask.shape)}
    return {**state, "masks": masks, "plan": None}
