"""Modules that no pass of a model runs, and the units that they may read."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import accumulate
from operator import mul

from torch import nn

from lightning_prune.channels.compaction.module_widths import input_sizes
from lightning_prune.channels.graph.recorder import PassRecord
from lightning_prune.core.averages import averaged_modules
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices


class UnseenModules:
    """The modules with weights that no pass runs.

    Args:
        model: The model.
        ran: Names of the parameters and buffers that some pass runs.
        passes: The records of the passes.
    """

    def __init__(self, model: nn.Module, ran: Container[str], passes: Iterable[PassRecord]) -> None:
        seen = {id(parameter) for name, parameter in model.named_parameters() if name in ran}
        # averages are cut along with what they average
        averages = tuple(f"{name}." for name in averaged_modules(model))
        self._inputs = {
            name: sizes
            for name, module in model.named_modules()
            if not f"{name}.".startswith(averages)
            and (sizes := input_sizes(module, _unseen_parameters(module, seen)))
        }
        self._shapes = {shape for each in passes for _, shapes in each.steps for shape in shapes}

    def reader_of(self, group: UnitGroup) -> str | None:
        """Return the reason to keep a group that an unseen module may read; ``None`` if no module may.

        A module may read it if its inputs are as many as a layer of the group has channels, or as many as the
        flattened activations of such a layer.
        """
        if not self._inputs:
            return None
        widths = {part.weight.shape[part.dim] for part in axis_slices(group.masked)}
        readable = {flat for shape in self._shapes if widths & {*shape} for flat in _flat_sizes(shape)} | widths
        for name, sizes in self._inputs.items():
            if sizes & readable:
                return (
                    f"may be read by {name or 'the model itself'}, which the example does not run: give an"
                    " example that does, among several (example=[...]), or leave it out of the model"
                )
        return None


def _unseen_parameters(module: nn.Module, seen: Container[int]) -> list[str]:
    """Return the names within a module of its own parameters whose ``id`` is not among those that ran.

    If others of them did, those of one dimension do not count: a bias that is left out reads nothing.
    """
    own = dict(module.named_parameters(recurse=False))
    unseen = [leaf for leaf, parameter in own.items() if id(parameter) not in seen]
    return unseen if len(unseen) == len(own) else [leaf for leaf in unseen if own[leaf].ndim > 1]


def _flat_sizes(shape: Iterable[int]) -> set[int]:
    """Return the sizes that a tensor's last dimensions have when they are flattened, one of them or several."""
    return set(accumulate(reversed([*shape]), mul))
