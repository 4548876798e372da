"""Modules that no pass of a model runs, and the units that they may read or meet."""

from __future__ import annotations

from collections.abc import Container, Iterable, Set
from math import prod

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.recorder import PassRecord
from lightning_prune.core.averages import averaged_modules
from lightning_prune.core.trained import metric_tensors
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
        seen = {id(tensor) for name, tensor in held if name in ran} | metric_tensors(model)
        # averages are cut along with what they average
        averages = tuple(f"{name}." for name in averaged_modules(model))
        self._unseen = {
            name: unseen
            for name, module in model.named_modules()
            if not f"{name}.".startswith(averages) and (unseen := _unseen_shapes(module, seen))
        }
        self._widths = {each.shape[0] for each in model.parameters() if each.ndim > 1}
        self._shapes = {shape for each in passes for _, shapes in each.steps for shape in shapes}

    def reader_of(self, group: UnitGroup) -> str | None:
        """Return the reason to keep a group that an unseen module may read or meet; ``None`` if none may.

        A module may if one of its tensors has a dimension of as many elements as a layer of the group has
        channels, or as many as the flattened activations of such a layer; or if one of its matrices has as many
        rows or columns as there are outputs of such a layer and of any other one, side by side.
        """
        if not self._unseen:
            return None
        widths = {part.weight.shape[part.dim] for part in axis_slices(group.masked)}
        readable = widths.union(*(_flat_sizes(shape, widths) for shape in self._shapes))
        sums = {width + other for width in widths for other in self._widths}
        for name, shapes in self._unseen.items():
            sizes = {size for shape in shapes for size in shape if size > 1}
            matrices = {size for shape in shapes if len(shape) > 1 for size in shape[:2]}
            if sizes & readable or matrices & sums:
                return (
                    f"may be read by {name or 'the model itself'}, which the example does not run: give an"
                    " example that does, among several (example=[...]), or leave it out of the model"
                )
        return None


def _unseen_shapes(module: nn.Module, seen: Container[int]) -> set[torch.Size]:
    """Return the shapes of a module's own tensors whose ``id`` is not among those that ran.

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
    return {tensor.shape[skipped:] for tensor in unseen.values()}


def _flat_sizes(shape: torch.Size, widths: Set[int]) -> set[int]:
    """Return the sizes that the last dimensions have when they are flattened, if one of them is a width."""
    tails = (shape[start:] for start in range(len(shape)))
    return {prod(tail) for tail in tails if widths & {*tail}}
