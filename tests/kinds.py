"""The three kinds of pruning that every mechanism is tried with, and what holds of each."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightnings import LightningModule

from lightning_prune import Channels, Global, NofM, PruningCallback, Unstructured

KINDS: dict[str, Any] = {
    "weights": partial(PruningCallback, 0.5, structure=Unstructured(), selector=Global()),
    "channels": partial(PruningCallback, 0.5, structure=Channels(), selector=Global()),
    "2:4": partial(PruningCallback, structure=Unstructured(), selector=NofM(2, 4)),
}


def masked(pruning: PruningCallback) -> int:
    """How many weights are masked."""
    return sum(int((~mask).sum()) for mask in pruning.masks.values())


def loose(pruning: PruningCallback, model: LightningModule) -> int:
    """How many masked weights are not 0."""
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in pruning.masks.items())
