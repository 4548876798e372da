"""What a callback saves in a checkpoint, as a whole: which version, and that all of it is as it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.core.schema import anything, integer, mapping, read, record, string, summary
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.report.history import HISTORY
from lightning_prune.training.fit_events import FIT_EVENTS, FIT_EVENTS_BEFORE
from lightning_prune.training.pruned_network import PRUNED_NETWORK

STATE_VERSION = 1
_VERSIONED = record({"version": anything}, before={"version": None}, others=True)
_STATE = record(
    {
        "version": integer(STATE_VERSION),
        "settings": mapping(string),
        "pruner": PRUNED_NETWORK,
        **FIT_EVENTS,
        **HISTORY,
    },
    before=FIT_EVENTS_BEFORE,
)


def read_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a whole state.

    Raises:
        ValueError: If it is none, or a later version of lightning_prune wrote it.
    """
    version = read(state, _VERSIONED, PRUNING_STATE)["version"]
    if not isinstance(version, int) or version != STATE_VERSION:
        raise ValueError(
            f"the checkpoint's pruning state has version {summary(version)}, this lightning_prune reads"
            f" {STATE_VERSION}: install the version that wrote it."
        )
    return read(state, _STATE, PRUNING_STATE)


def changed_settings(saved: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """What is set otherwise than it was, in words; earlier versions had fewer parts, which were off."""
    before = {name: saved.get(name, repr(None)) for name in settings}
    return {
        name: f"{name} was {before[name]}, is now {now}"
        for name, now in settings.items()
        if before[name] != now
    }
