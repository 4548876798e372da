"""Channels, filters and neurons, with all that is coupled to them in other layers."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.structures.coupled import Coupled
from lightning_prune.units.groups import UnitGroup


@dataclass(frozen=True, repr=False)
class Channels(Coupled):
    """Channels of convolutions and neurons of linear layers, wherever they lead.

    A pass on an example is traced, so that residual sums, concatenations, depthwise convolutions and the like
    couple what they must. A unit is masked in the weights that make it, in norms, and in the inputs of the
    weights that read it; its score counts the weights that make it. What cannot be cut without a change of the
    outputs is frozen, with the reason: each group is cut on trial, on a copy in double precision, before it may
    be pruned. The network's own inputs and outputs stay. Attention heads are among the units, each as a whole.

    Args:
        include: Glob pattern, or patterns, over parameter and module names: with it, only channels that one of
            these makes go.
        exclude: The same, for what is to stay dense, with all that is coupled to it.
        round_to: Each width becomes a multiple of this, unless it stays whole: the nearest to what the selector
            wants, of two the larger. 8 is what tensor cores like. The exact count gives way to it.
        minimum: How many channels each layer keeps at least: a number or, below 1, a share of its width.
        max_seconds: How long it may take to find them and to try each cut.

    Raises:
        ValueError: If a pattern is no string, or a number is out of range.
    """

    def takes(self, group: UnitGroup) -> bool:
        """All of them."""
        return True
