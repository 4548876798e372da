"""Label rules for ops that move or copy elements: such an op is run again on the labels of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.channels.graph.calls import Call, Rule, tensors_of
from lightning_prune.channels.graph.label_fields import (
    Fields,
    align_rank,
    couple_across,
    drop_constant_dims,
    varying_dims,
)


def same(call: Call) -> Sequence[Fields]:
    """Return the fields of the first tensor, for each output of its shape."""
    fields = call.fields(call.tensors[0])
    return [fields if output.shape == call.tensors[0].shape else () for output in call.outputs]


def made_anew(call: Call) -> Sequence[Fields]:
    """Return no fields: only the type and the device of the tensor are read."""
    return [() for _ in call.outputs]


def restride(call: Call) -> Sequence[Fields]:
    """Return the fields of a tensor whose strides change; freeze them if they do not fit its new shape.

    Pooling of tensors with channels last ends with such an op.
    """
    fields, shape = call.fields(call.tensors[0]), call.argument("size")
    if all(
        field.ndim == len(shape) and all(field.shape[dim] == shape[dim] for dim in varying_dims(field))
        for field in fields
    ):
        return [fields]
    call.freeze(fields, f"is laid out anew by {call.title}")
    return [()]


def copy(call: Call) -> Sequence[Fields]:
    """Return the fields of the source, which overwrites the target."""
    target, source = call.tensors
    return [tuple(align_rank(field, target.ndim) for field in call.fields(source))]


def _moved(call: Call, run: Callable[..., Any], moving: Sequence[Tensor] = ()) -> list[list[Tensor]]:
    """Run an op on label fields in place of data.

    Args:
        call: The op that ran on data, whose arguments are replaced.
        run: The function to call.
        moving: The tensors whose elements are moved; by default all that are numbers or have labels.

    Returns:
        The fields of each output, those that vary along no dimension included.
    """
    moving = moving or [each for each in call.tensors if each.is_floating_point() or call.fields(each)]
    data = set(map(id, moving))
    count = max(len(call.fields(tensor)) for tensor in moving)
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for number in range(count):

        def labelled(leaf: Any, number: int = number) -> Any:
            if id(leaf) not in data:
                return leaf
            fields = call.fields(leaf)
            field = fields[number] if number < len(fields) else torch.zeros((1,) * leaf.ndim, dtype=torch.int64)
            return field.expand(leaf.shape)

        args, kwargs = tree_map(labelled, (call.args, call.kwargs))
        for result, leaf in zip(results, tensors_of([run(*args, **kwargs)]), strict=True):
            result.append(drop_constant_dims(call.labels, leaf))
    return results


def _varying(fields: Iterable[Tensor]) -> Fields:
    """Return the fields without those that vary along no dimension."""
    return tuple(field for field in fields if varying_dims(field))


def _move_coupled(call: Call, free: Iterable[int]) -> Sequence[Fields]:
    """Move the labels to the op's only output, and couple them along all dimensions that are not free."""
    (moved,) = _moved(call, call.func)
    return [_varying(couple_across(call.labels, field, free) for field in moved)]


def move(call: Call) -> Sequence[Fields]:
    """Move the labels as the op moves the elements."""
    return [_varying(result) for result in _moved(call, call.func)]


def reshape(call: Call) -> Sequence[Fields]:
    """Reshape the labels; where one labelled dimension becomes several, couple them along all of these but one.

    The kept elements must be a product of kept indices along each of the new dimensions. The record's ``split``
    chooses the dimension whose labels stay apart.
    """
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
    return [_varying(folded)]


def pixel_shuffle(call: Call) -> Sequence[Fields]:
    """Couple the channels that become the positions of one output channel."""
    return _move_coupled(call, [call.outputs[0].ndim - 3])


def concatenate(call: Call) -> Sequence[Fields]:
    """Concatenate the labels; along dimensions in which no input's labels vary, couple those of the parts."""
    labelled = [varying_dims(field) for tensor in call.tensors for field in call.fields(tensor)]
    return _move_coupled(call, frozenset().union(*labelled))


def stack(call: Call) -> Sequence[Fields]:
    """Couple the labels of the tensors that are stacked, which have one shape."""
    rank = call.outputs[0].ndim
    return _move_coupled(call, frozenset(range(rank)) - {call.argument("dim") % rank})


def split(call: Call) -> Sequence[Fields]:
    """Couple the labels of parts of equal size, so that each keeps the same indices.

    Labels along a dimension that is split into parts of different sizes are frozen: the sizes that the parts
    would have after pruning are unknown.
    """
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    equal = len({output.shape for output in call.outputs}) == 1
    if not equal:
        call.freeze_along(call.fields(tensor), frozenset({dim}), "is split into parts of different sizes")
    first, *others = results = move(call)
    for result in others:
        if len(result) == len(first) and equal:
            for left, right in zip(first, result, strict=True):
                call.labels.couple(left, right)
    return results


def picked(dims: Callable[[Call], Sequence[int]]) -> Rule:
    """Return the rule for ops that address elements by index.

    Labels along the indexed dimensions are frozen, and so are those of the index itself.

    Args:
        dims: Returns the indexed dimensions of an op.
    """

    def rule(call: Call) -> Sequence[Fields]:
        tensor = call.tensors[0]
        addressed = frozenset(dim % tensor.ndim for dim in dims(call))
        call.freeze_along(call.fields(tensor), addressed, call.by_position)
        for index in call.tensors[1:]:
            call.freeze(call.fields(index), f"decides what {call.title} takes")
        return [_varying(result) for result in _moved(call, call.func, [tensor])]

    return rule


def cut_out(call: Call) -> Sequence[Fields]:
    """Couple the labels of a slice with those of the other parts, if it is one of several of equal size.

    Labels along the sliced dimension are frozen otherwise.
    """
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    whole, length, start = tensor.shape[dim], call.outputs[0].shape[dim], call.argument("start") or 0
    if call.argument("step") != 1 or not length or whole % length or start % length:
        call.freeze_along(call.fields(tensor), frozenset({dim}), call.by_position)
    else:
        for field in call.fields(tensor):
            if dim in varying_dims(field):
                first, *rest = field.split(length, dim)
                for part in rest:
                    call.labels.couple(first, part)
    return move(call)


def pad(call: Call) -> Sequence[Fields]:
    """Pad each field with the label 0 along the dimensions in which it varies."""
    fields = []
    for field in call.fields(call.tensors[0]):
        amounts = list(call.argument("pad"))
        for number in range(len(amounts)):
            if field.shape[-1 - number // 2] == 1:
                amounts[number] = 0
        fields.append(torch.nn.functional.pad(field, amounts))
    return [_varying(fields)]


def embedding(call: Call) -> Sequence[Fields]:
    """Freeze the labels of the rows, which are addressed by index, and return those of the columns."""
    weight, indices = call.args[:2]
    fields = call.freeze_along(
        call.fields(weight), frozenset({0}), "holds the rows of an embedding, which are addressed by position"
    )
    return [tuple(align_rank(field.view(-1), indices.ndim + 1) for field in fields)]


def rolled(call: Call) -> Sequence[int]:
    """Return the dimensions of a roll or flip, all if none are given."""
    return call.argument("dims") or range(call.tensors[0].ndim)


def indexed(call: Call) -> Sequence[int]:
    """Return the dimensions that have an index tensor; one of truth values may stand for several."""
    dims: list[int] = []
    place = 0
    for index in call.argument("indices"):
        count = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        dims += [] if index is None else range(place, place + count)
        place += count
    return dims


def along_dim(call: Call) -> Sequence[int]:
    """Return the one dimension that the op is given."""
    return [call.argument("dim")]
