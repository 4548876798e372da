"""Modules that no pass of a model runs, and the units that they may read or meet."""

from __future__ import annotations

from collections.abc import Container, Iterable, Set
from math import prod

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.recorder import PassRecord
from lightning_prune.core.averages import averaged_modules, frozen_twins, is_apart
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
        self._model = model
        self._unseen = {
            name: unseen
            for name, module in model.named_modules()
            if not f"{name}.".startswith(averages) and (unseen := _unseen_shapes(module, seen))
        }
        self._doubles = _doubles(model, seen)
        self._running = {
            name
            for name, module in model.named_modules()
            if any(id(tensor) in seen for tensor in (*module.parameters(), *module.buffers()))
        }
        self._widths = {each.shape[0] for each in model.parameters() if each.ndim > 1}
        self._shapes = {shape for each in passes for _, shapes in each.steps for shape in shapes}

    def reader_of(self, group: UnitGroup) -> str | None:
        """Return the reason to keep a group that an unseen module may read or meet; ``None`` if none may.

        A module may if one of its tensors has a dimension of as many elements as a layer of the group has
        channels, or as many as the flattened activations of such a layer; or if one of its matrices has as many
        rows or columns as there are outputs of such a layer and of any other one, side by side.

        A buffer that is the double of one that ran, as the first frequencies of rotary embeddings are, meets
        what that one does.

        A copy of the part that the group lies in, such as a teacher, reads its own layers and not those of the
        group. Shapes alone do not tell a copy from a second head, so the user has to say so, by excluding it.
        """
        if not self._unseen:
            return None
        widths = {part.weight.shape[part.dim] for part in axis_slices(group.masked)}
        readable = widths.union(*(_flat_sizes(shape, widths) for shape in self._shapes))
        sums = {width + other for width in widths for other in self._widths}
        cut = {part.name for part in (*group.masked, *group.buffers)}
        for name, shapes in self._unseen.items():
            for leaf, shape in shapes.items():
                met = {size for size in shape if size > 1} & readable
                if len(shape) > 1:
                    met |= {*shape[:2]} & sums
                doubled = self._doubles.get(f"{name}.{leaf}".lstrip("."))
                if met if doubled is None else doubled & cut:
                    copied = self._copy_around(name, group)
                    if copied is not None and is_apart(self._model.get_submodule(copied)):
                        break
                    return self._reason(name, leaf, copied)
        return None

    def _copy_around(self, name: str, group: UnitGroup) -> str | None:
        """Return the name of the frozen copy that an unseen module is in, of a part that a group lies in."""
        masked = {id(part.weight) for part in group.masked}
        parts = name.split(".")
        for length in range(1, len(parts) + 1) if name else ():
            place = ".".join(parts[:length])
            twins = [] if place in self._running else frozen_twins(self._model, place)
            if any(masked <= {id(each) for each in twin.parameters()} for twin in twins):
                return place
        return None

    def _reason(self, name: str, leaf: str, copied: str | None) -> str:
        """Return the reason to keep a group.

        Args:
            name: Name of the unseen module.
            leaf: Name of its tensor that the group may meet.
            copied: Name of the frozen copy that it is in, if it is in one.
        """
        if name in self._running:
            what = f"may meet {f'{name}.{leaf}'.lstrip('.')}, which the example does not use"
        else:
            what = f"may be read by {name}, which the example does not run"
        advice = ["give an example that does, among several (example=[...])", "leave it out of the model"]
        if copied is not None:
            advice.insert(
                1, f"exclude {copied} if it is a copy that reads its own layers only, as a teacher does"
            )
        return f"{what}: {', '.join(advice[:-1])}, or {advice[-1]}"


def _doubles(model: nn.Module, seen: Container[int]) -> dict[str, set[str]]:
    """Return, for each buffer that no pass runs, those of its module with the same values that one does."""
    found: dict[str, set[str]] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_buffers(prefix, recurse=False))
        ran = {name: each for name, each in own.items() if id(each) in seen and each.numel() > 1}
        for name in own.keys() - ran.keys():
            same = {other for other, each in ran.items() if torch.equal(own[name], each)}
            found |= {name: same} if same else {}
    return found


def _unseen_shapes(module: nn.Module, seen: Container[int]) -> dict[str, torch.Size]:
    """Return the shapes, by name, of a module's own tensors whose ``id`` is not among those that ran.

    A bias that is left out beside a weight that ran does not count, nor do the rows of an embedding, nor what
    has no elements, as the weights of an expert that was cut.
    """
    own: dict[str, Tensor] = dict(
        (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    )
    unseen = {
        name: tensor
        for name, tensor in own.items()
        if id(tensor) not in seen and tensor.is_floating_point() and tensor.numel()
    }
    if "weight" in own and "weight" not in unseen:
        unseen.pop("bias", None)
    skipped = 1 if isinstance(module, nn.Embedding | nn.EmbeddingBag) else 0
    return {name: tensor.shape[skipped:] for name, tensor in unseen.items()}


def _flat_sizes(shape: torch.Size, widths: Set[int]) -> set[int]:
    """Return the sizes that the last dimensions have when they are flattened, if one of them is a width."""
    tails = (shape[start:] for start in range(len(shape)))
    return {prod(tail) for tail in tails if widths & {*tail}}
