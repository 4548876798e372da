"""The channel graph: what is coupled across layers, found by following labels through real passes."""

from lightning_prune.graph.calls import Split
from lightning_prune.graph.costs import budgets
from lightning_prune.graph.groups import find_groups, unique_names
from lightning_prune.graph.trace import Trace, first, heads, last

__all__ = ["Split", "Trace", "budgets", "find_groups", "first", "heads", "last", "unique_names"]
