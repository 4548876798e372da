"""What lives or dies together: which unit groups a model has, and what stays out, with the reason."""

from lightning_prune.structures.base import Structure
from lightning_prune.structures.channels import Channels
from lightning_prune.structures.heads import Heads
from lightning_prune.structures.weights import Blocks, Unstructured

__all__ = ["Blocks", "Channels", "Heads", "Structure", "Unstructured"]
