"""Attention heads."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.structures.coupled import Coupled
from lightning_prune.units.groups import UnitGroup


@dataclass(frozen=True, repr=False)
class Heads(Coupled):
    """Attention heads: queries, keys, values and what reads them, in fused projections or separate ones.

    Found as :class:`Channels` finds its units, by what is computed: a head is what a product of two activations
    treats as a batch. Attention in a module of your own is cut where it keeps the number of heads, or the width
    of them all, in attributes, which are adjusted; with a number written into ``forward`` it stays, and the
    report says so. Michel, Levy and Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019.

    Args:
        include: Glob pattern, or patterns, over parameter and module names: with it, only heads that one of
            these makes go.
        exclude: The same, for what is to stay dense.
        round_to: How many heads stay in each layer is a multiple of this, unless all do.
        minimum: How many heads each layer keeps at least: a number or, below 1, a share.
        max_seconds: How long it may take to find them and to try each cut.

    Raises:
        ValueError: If a pattern is no string, or a number is out of range.
    """

    def takes(self, group: UnitGroup) -> bool:
        """Heads only."""
        return group.heads
