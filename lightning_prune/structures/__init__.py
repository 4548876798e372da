"""Structures: which weights of a model are pruned together, as unit groups, and which are frozen, and why."""

from lightning_prune.structures.base import Structure
from lightning_prune.structures.channels import Channels
from lightning_prune.structures.heads import Heads
from lightning_prune.structures.weights import Blocks, Unstructured

__all__ = ["Blocks", "Channels", "Heads", "Structure", "Unstructured"]
