"""Ops that move elements about: run again on labels, they say where each went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.channels.graph.calls import Call, Rule
from lightning_prune.channels.graph.label_fields import (
    Fields,
    align_rank,
    couple_across,
    drop_constant_dims,
    varying_dims,
)


def same(call: Call) -> Sequence[Fields]:
    """Element for element the first argument."""
    fields = call.fields(call.tensors[0])
    return [fields if output.shape == call.tensors[0].shape else () for output in call.outputs]


def restride(call: Call) -> Sequence[Fields]:
    """The same elements in another layout, as pooling ends with where channels come last."""
    fields, shape = call.fields(call.tensors[0]), call.argument("size")
    if all(len(shape) == field.ndim and all(map(_fits, field.shape, shape)) for field in fields):
        return [fields]
    call.freeze(fields, f"is laid out anew by {call.name}")
    return [()]


def _fits(varied: int, size: int) -> bool:
    return varied in (1, size)


def copy(call: Call) -> Sequence[Fields]:
    """What was there is gone: labels are those of the source."""
    target, source = call.tensors
    return [tuple(align_rank(field, target.ndim) for field in call.fields(source))]


def _moved(call: Call, run: Callable[..., Any]) -> list[list[Tensor]]:
    """Runs the op on labels in place of data: for each output its fields."""
    data = {id(tensor) for tensor in call.tensors if tensor.is_floating_point() or call.fields(tensor)}
    count = max(len(call.fields(tensor)) for tensor in call.tensors)
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for place in range(count):

        def labelled(leaf: Any, place: int = place) -> Any:
            if id(leaf) not in data:
                return leaf
            fields = call.fields(leaf)
            field = fields[place] if place < len(fields) else torch.zeros((1,) * leaf.ndim, dtype=torch.int64)
            return field.expand(leaf.shape)

        args, kwargs = tree_map(labelled, (call.args, call.kwargs))
        leaves = [leaf for leaf in tree_leaves(run(*args, **kwargs)) if torch.is_tensor(leaf)]
        for result, leaf in zip(results, leaves, strict=True):
            result.append(drop_constant_dims(call.labels, leaf))
    return results


def _fields(fields: list[Tensor]) -> Fields:
    return tuple(field for field in fields if varying_dims(field))


def move(call: Call) -> Sequence[Fields]:
    """Elements change places: so do their labels."""
    return [_fields(result) for result in _moved(call, call.func)]


def reshape(call: Call) -> Sequence[Fields]:
    """Where one labelled dimension becomes several, what is kept must stay a product: one of them is free."""
    before = call.fields(call.tensors[0])
    (moved,) = _moved(call, lambda tensor, *_, **__: tensor.reshape(call.outputs[0].shape))
    folded = []
    for old, new in zip(before, moved, strict=True):
        dims = sorted(varying_dims(new))
        if len(dims) > len(varying_dims(old)) == 1:
            free = [dims[call.record.split([new.shape[dim] for dim in dims])]]
        else:
            free = dims[len(dims) - len(varying_dims(old)) :]
        folded.append(couple_across(call.labels, new, free))
    return [_fields(folded)]


def pixel_shuffle(call: Call) -> Sequence[Fields]:
    """Positions made of channels: those go together."""
    (moved,) = _moved(call, call.func)
    channel = call.outputs[0].ndim - 3
    return [_fields([couple_across(call.labels, field, [channel]) for field in moved])]


def concatenate(call: Call) -> Sequence[Fields]:
    """Labels side by side; along all other dimensions the parts agree."""
    (moved,) = _moved(call, call.func)
    before = [varying_dims(field) for tensor in call.tensors for field in call.fields(tensor)]
    free = frozenset[int]().union(*before)
    return [_fields([couple_across(call.labels, field, free) for field in moved])]


def stack(call: Call) -> Sequence[Fields]:
    """Parts of one shape, that agree."""
    (moved,) = _moved(call, call.func)
    dim = (call.argument("dim") or 0) % call.outputs[0].ndim
    free = frozenset(range(call.outputs[0].ndim)) - {dim}
    return [_fields([couple_across(call.labels, field, free) for field in moved])]


def split(call: Call) -> Sequence[Fields]:
    """Parts of one size keep the same places; a cut inside parts of different sizes cannot be known."""
    tensor = call.tensors[0]
    dim = (call.argument("dim") or 0) % tensor.ndim
    if len({output.shape for output in call.outputs}) > 1:
        call.without(call.fields(tensor), frozenset({dim}), "is split into parts of different sizes")
    results = [_fields(result) for result in _moved(call, call.func)]
    first = results[0]
    for result in results[1:]:
        if len(result) == len(first) and call.outputs[0].shape == call.outputs[-1].shape:
            for left, right in zip(first, result, strict=True):
                call.labels.couple(left, right)
    return results


def picked(dims: Callable[[Call], Sequence[int]]) -> Rule:
    """Moves elements by their places in some dimensions: labels there stay."""

    def rule(call: Call) -> Sequence[Fields]:
        tensor = call.tensors[0]
        places = frozenset(dim % tensor.ndim for dim in dims(call))
        call.without(call.fields(tensor), places, f"is addressed by position ({call.name})")
        return move(call)

    return rule


def cut_out(call: Call) -> Sequence[Fields]:
    """A part: as of a split where it is one of several of one size, otherwise labels there stay."""
    tensor = call.tensors[0]
    dim = (call.argument("dim") or 0) % tensor.ndim
    whole, length, start = tensor.shape[dim], call.outputs[0].shape[dim], call.argument("start") or 0
    if call.argument("step") != 1 or not length or whole % length or start % length:
        call.without(call.fields(tensor), frozenset({dim}), f"is addressed by position ({call.name})")
    else:
        for field in call.fields(tensor):
            if dim in varying_dims(field):
                first, *rest = field.split(length, dim)
                for part in rest:
                    call.labels.couple(first, part)
    return move(call)


def pad(call: Call) -> Sequence[Fields]:
    """Adds elements without labels, in dimensions that have any."""
    fields = []
    for field in call.fields(call.tensors[0]):
        amounts = list(call.argument("pad"))
        for place in range(len(amounts)):
            if field.shape[-1 - place // 2] == 1:
                amounts[place] = 0
        fields.append(torch.nn.functional.pad(field, amounts))
    return [_fields(fields)]


def embedding(call: Call) -> Sequence[Fields]:
    """Rows by position; the columns are what it makes."""
    weight, indices = call.args[:2]
    fields = call.without(call.fields(weight), frozenset({0}), "is addressed by position (embedding)")
    return [tuple(align_rank(field.view(-1), indices.ndim + 1) for field in fields)]


def rolled(call: Call) -> Sequence[int]:
    """The dimensions of a roll or flip."""
    return call.argument("dims") or range(call.tensors[0].ndim)


def indexed(call: Call) -> Sequence[int]:
    """The dimensions that have an index."""
    return [dim for dim, index in enumerate(call.argument("indices")) if index is not None]


def along_dim(call: Call) -> Sequence[int]:
    """The one dimension that is given."""
    return [call.argument("dim") or 0]
