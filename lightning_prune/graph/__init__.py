"""The channel graph: what is coupled across layers, found by following labels through real passes."""

from lightning_prune.graph.groups import find_groups
from lightning_prune.graph.trace import Trace

__all__ = ["Trace", "find_groups"]
