"""The shrink: a plan as data, its replay on a module, and the trial that it must pass first."""

from lightning_prune.compaction.analysis import analyse
from lightning_prune.compaction.plan import Cut, Plan, make_plan
from lightning_prune.compaction.replay import replay_
from lightning_prune.compaction.shrink import CompactionError, apply_masks_, compact, prove, remaining

__all__ = [
    "CompactionError",
    "Cut",
    "Plan",
    "analyse",
    "apply_masks_",
    "compact",
    "make_plan",
    "prove",
    "remaining",
    "replay_",
]
