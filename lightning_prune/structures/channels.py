"""Channels, filters and neurons, with all that is coupled to them in other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_prune.compaction import analyse
from lightning_prune.probe import as_probe
from lightning_prune.structures.base import Structure
from lightning_prune.structures.patterns import check_are_patterns, check_patterns, matches
from lightning_prune.units import UnitGroup, Units


@dataclass(frozen=True, repr=False)
class Channels(Structure):
    """Channels of convolutions and neurons of linear layers, wherever they lead.

    A pass on an example is traced, so that residual sums, concatenations, depthwise convolutions and the like
    couple what they must. A unit is masked in the weights that make it, in norms, and in the inputs of the
    weights that read it; its score counts the weights that make it. What cannot be cut without a change of the
    outputs is frozen, with the reason: each group is cut on trial, on a copy in double precision, before it may
    be pruned. The network's own inputs and outputs stay.

    Args:
        include: Glob pattern, or patterns, over parameter and module names: with it, only channels that one of
            these makes go.
        exclude: The same, for what is to stay dense, with all that is coupled to it.

    Raises:
        ValueError: If a pattern is no string.
    """

    needs_example = True

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_are_patterns(include=self.include, exclude=self.exclude)

    def units(self, model: nn.Module, example: Any = None) -> Units:
        """One group for each set of layers that share their channels."""
        if example is None:
            raise ValueError(
                f"example=None: {self!r} follows an example through the model. Give a tensor or a tuple of"
                " forward's arguments; a LightningModule may have it as example_input_array."
            )
        for name, parameter in model.named_parameters():
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet: run a batch before training starts.")
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        found = analyse(model, as_probe(example))
        frozen = dict(found.frozen)
        wanted = []
        for group in found.groups:
            if self._wants(group):
                wanted.append(group)
            else:
                frozen[group.name] = f"left out by {self!r}"
        if not wanted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in frozen.items())
            raise ValueError(f"{self!r} finds nothing to prune in {type(model).__name__}. {reasons}".rstrip())
        return Units(tuple(wanted), frozen)

    def _wants(self, group: UnitGroup) -> bool:
        makers = [part.name for part in group.slices]
        if any(matches(name, self.exclude) for name in makers):
            return False
        return self.include is None or any(matches(name, self.include) for name in makers)
