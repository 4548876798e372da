"""Modules that no pass of a model runs, and the units that they may read or meet."""

from __future__ import annotations

from collections.abc import Container, Iterable, Set
from math import prod

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.recorder import PassRecord
from lightning_prune.core.averages import averaged_modules
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices


class UnseenModules:
    """The modules with weights or buffers that no pass runs.

    Args:
        model: The model.
        ran: Names of the parameters and buffers that some pass runs.
        passes: The records of the passes.
    """

    def __init__(self, model: nn.Module, ran: Container[str], passes: Iterable[PassRecord]) -> None:
        held = (*model.named_parameters(), *model.named_buffers())
        seen = {id(tensor) for name, tensor in held if name in ran}
        # averages are cut along with what they average
        averages = tuple(f"{name}." for name in averaged_modules(model))
        self._sizes = {
            name: sizes
            for name, module in model.named_modules()
            if not f"{name}.".startswith(averages) and (sizes := _unseen_sizes(module, seen))
        }
        self._shapes = {shape for each in passes for _, shapes in each.steps for shape in shapes}

    def reader_of(self, group: UnitGroup) -> str | None:
        """Return the reason to keep a group that an unseen module may read or meet; ``None`` if none may.

        A module may if one of its tensors has a dimension of as many elements as a layer of the group has
        channels, or as many as the flattened activations of such a layer.
        """
        if not self._sizes:
            return None
        widths = {part.weight.shape[part.dim] for part in axis_slices(group.masked)}
        readable = widths.union(*(_flat_sizes(shape, widths) for shape in self._shapes))
        for name, sizes in self._sizes.items():
            if sizes & readable:
                return (
                    f"may be read by {name or 'the model itself'}, which the example does not run: give an"
                    " example that does, among several (example=[...]), or leave it out of the model"
                )
        return None


def _unseen_sizes(module: nn.Module, seen: Container[int]) -> set[int]:
    """Return the sizes of the dimensions of a module's own tensors whose ``id`` is not among those that ran.

    A bias that is left out beside a weight that ran does not count, nor do the rows of an embedding.
    """
    own: dict[str, Tensor] = dict(
        (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    )
    unseen = {
        name: tensor for name, tensor in own.items() if id(tensor) not in seen and tensor.is_floating_point()
    }
    if "weight" in own and "weight" not in unseen:
        unseen.pop("bias", None)
    skipped = 1 if isinstance(module, nn.Embedding | nn.EmbeddingBag) else 0
    return {size for tensor in unseen.values() for size in tensor.shape[skipped:] if size > 1}


def _flat_sizes(shape: torch.Size, widths: Set[int]) -> set[int]:
    """Return the sizes that the last dimensions have when they are flattened, if one of them is a width."""
    tails = (shape[start:] for start in range(len(shape)))
    return {prod(tail) for tail in tails if widths & {*tail}}
