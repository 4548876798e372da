"""The channel graph: what is coupled across layers, found by following labels through real passes."""

from lightning_prune.channels.graph.costs import budgets
from lightning_prune.channels.graph.groups import find_groups, unique_names
from lightning_prune.channels.graph.liveness import OpRecord, OpRecorder
from lightning_prune.channels.graph.trace import Split, Trace, first_dim, head_dim, last_dim, split_head_dim

__all__ = [
    "OpRecord",
    "OpRecorder",
    "Split",
    "Trace",
    "budgets",
    "find_groups",
    "first_dim",
    "head_dim",
    "last_dim",
    "split_head_dim",
    "unique_names",
]
