"""The channel graph: what is coupled across layers, found by following labels through real passes."""

from lightning_prune.channels.graph.costs import budgets
from lightning_prune.channels.graph.groups import find_groups, unique_names
from lightning_prune.channels.graph.liveness import Step, Tape
from lightning_prune.channels.graph.trace import Split, Trace, first, heads, last, split_heads

__all__ = [
    "Split",
    "Step",
    "Tape",
    "Trace",
    "budgets",
    "find_groups",
    "first",
    "heads",
    "last",
    "split_heads",
    "unique_names",
]
