"""Compaction: plan which slices of tensors to cut, check on a copy that outputs stay the same, and cut them."""

from lightning_prune.channels.compaction.analysis import analyse
from lightning_prune.channels.compaction.plan import PLAN, Cut, Plan, make_plan, shapes_after
from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.channels.compaction.shrink import CompactionError, compact, compact_
from lightning_prune.channels.compaction.tracing import macs_by_weight

__all__ = [
    "PLAN",
    "CompactionError",
    "Cut",
    "Plan",
    "analyse",
    "compact",
    "compact_",
    "expand_",
    "macs_by_weight",
    "make_plan",
    "replay_",
    "shapes_after",
]
