"""The structures that are coupled across layers: channels, and attention heads."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.structures.coupled import Coupled
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import axis_slices


@dataclass(frozen=True, repr=False)
class Channels(Coupled):
    """Channels, neurons and hidden units, with all slices of other layers coupled to them.

    A forward pass on an example is traced, so that channels that meet in residual sums, concatenations,
    depthwise convolutions and the like become one unit. A unit is masked in the weights that make it, in norms,
    and in the inputs of the weights that read it; its score counts the weights that make it. Before a group may
    be pruned, some of its units are cut on a copy of the model, in double precision where the model runs in it;
    a group whose cut would change the outputs is frozen, with the reason. Inputs and outputs of the model are
    not pruned. Attention heads are units as well, each as a whole.

    Args:
        include: Glob pattern over parameter and module names, or class of modules, or several of these, as for
            :class:`Unstructured`. With it, only channels that are made by a matching parameter or module are
            pruned; also by those that do not train. Of a model that cannot be followed as a whole, the parts
            that hold these are followed alone, on the inputs that they get.
        exclude: The same, for channels that are not pruned, in all layers that they are coupled to.
        round_to: The number of channels that a layer keeps is rounded to a multiple of this: to the multiple
            nearest to the number that the selector asks for, and to the larger of two equally near ones. Where
            a unit is several channels, as in grouped convolutions, that is a multiple which units can have;
            a layer that has none stays whole, with the reason. The target is therefore met less exactly. Tensor
            cores work best with 8.
        minimum: How many channels each layer keeps at least: a number or, below 1, a share of its width.
        max_seconds: Time limit to find the channels and to try each cut, in seconds.

    Raises:
        ValueError: If a pattern is neither a string nor a class, or a number is out of range.
    """

    def includes(self, group: UnitGroup) -> bool:
        """Return True: all groups are pruned, those of attention heads included."""
        return True

    def sizes(self, group: UnitGroup) -> set[int]:
        """Return how many channels of each layer a unit is; of attention, the size of a head.

        A hidden unit of a recurrent layer is a row of each gate, and a column of what reads the state.
        """
        makers = {part.name for part in group.slices}
        readers = [part for part in group.readers if group.heads or part.name in makers]
        layers = axis_slices([*group.slices, *readers])
        found = {int(part.index[part.index >= 0].bincount().max()) for part in layers if part.index is not None}
        return {min(found)} if group.heads else found


@dataclass(frozen=True, repr=False)
class Heads(Coupled):
    """Attention heads: queries, keys, values, in fused or separate projections, and the weights that read them.

    They are found in a trace of the forward pass, as :class:`Channels` finds its units: a head is an index of a
    batch dimension in a product of two activations. Attention in a module of your own can be cut if the module
    keeps the number of heads, or the width of all heads, in attributes, which are adjusted; if ``forward``
    contains the number itself, the heads are frozen, and the report gives the reason. Michel, Levy and Neubig,
    Are Sixteen Heads Really Better than One?, NeurIPS 2019.

    Args:
        include: Glob pattern over parameter and module names, or class of modules, or several of these, as for
            :class:`Unstructured`. With it, only heads that are made by a matching parameter or module are
            pruned; also by those that do not train.
        exclude: The same, for heads that are not pruned.
        round_to: The number of heads that a layer keeps is a multiple of this, unless it keeps all.
        minimum: How many heads each layer keeps at least: a number or, below 1, a share.
        max_seconds: Time limit to find the heads and to try each cut, in seconds.

    Raises:
        ValueError: If a pattern is neither a string nor a class, or a number is out of range.
    """

    def includes(self, group: UnitGroup) -> bool:
        """Return whether the units of the group are attention heads."""
        return group.heads

    def why_not(self, group: UnitGroup, found: Units) -> str | None:
        """Return why the heads cannot go whole, where channels within them can."""
        failed = found.failed_heads
        return next((failed[part.name] for part in group.slices if part.name in failed), None)

    def sizes(self, group: UnitGroup) -> set[int]:
        """Return 1: a unit is one head."""
        return {1}
