"""The shrink: a plan as data, its replay on a module, and the trial that it must pass first."""

from lightning_prune.compaction.analysis import analyse
from lightning_prune.compaction.follow import macs_by_weight
from lightning_prune.compaction.plan import PLAN, Cut, Plan, make_plan, shapes_after
from lightning_prune.compaction.replay import expand_, replay_
from lightning_prune.compaction.shrink import CompactionError, compact, compact_

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
