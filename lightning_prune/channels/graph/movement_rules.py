"""Label rules for ops that move or copy elements: such an op is run again on the labels of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, combinations, pairwise
from math import prod
from types import MappingProxyType
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
    partition,
    varying_dims,
)
from lightning_prune.channels.graph.labels import NOT_CUT
from lightning_prune.channels.graph.sliced_parts import couple_alike
from lightning_prune.channels.graph.trace_record import Role


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


def moved_fields(
    call: Call,
    run: Callable[..., Any],
    moving: Sequence[Tensor] = (),
    known: Mapping[int, Fields] = MappingProxyType({}),
) -> list[list[Tensor]]:
    """Run an op on label fields in place of data.

    Args:
        call: The op that ran on data, whose arguments are replaced.
        run: The function to call.
        moving: The tensors whose elements are moved; by default all that are numbers or have labels.
        known: ``id`` of tensors to the fields to move in place of those that they have.

    Returns:
        The fields of each output, those that vary along no dimension included.
    """
    moving = moving or [
        each for each in call.tensors if each.is_floating_point() or each.is_complex() or call.fields(each)
    ]
    given = {id(tensor): known.get(id(tensor), call.fields(tensor)) for tensor in moving}
    count = max(map(len, given.values()), default=0)
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for number in range(count):

        def labelled(leaf: Any, number: int = number) -> Any:
            if id(leaf) not in given:
                return leaf
            fields = given[id(leaf)]
            field = fields[number] if number < len(fields) else torch.zeros((1,) * leaf.ndim, dtype=torch.int64)
            return field.expand(call.shape(leaf))

        args, kwargs = tree_map(labelled, (call.args, call.kwargs))
        for result, leaf in zip(results, tensors_of([run(*args, **kwargs)]), strict=True):
            result.append(drop_constant_dims(call.labels, leaf))
    return results


def varying(fields: Iterable[Tensor]) -> Fields:
    """Return the fields without those that vary along no dimension."""
    return tuple(field for field in fields if varying_dims(field))


def _move_coupled(
    call: Call, free: Iterable[int], known: Mapping[int, Fields] = MappingProxyType({})
) -> Sequence[Fields]:
    """Move the labels of all tensors to the only output, and couple them along dimensions that are not free."""
    (moved,) = moved_fields(call, call.func, call.tensors, known)
    return [varying(couple_across(call.labels, field, free) for field in moved)]


def move(call: Call) -> Sequence[Fields]:
    """Move the labels as the op moves the elements."""
    return [varying(result) for result in moved_fields(call, call.func)]


def repeat(call: Call) -> Sequence[Fields]:
    """Move the labels; values without labels get free ones along each dimension in which they are repeated.

    Such a dimension takes any size, as that of a mask that is expanded over the heads of attention.
    """
    tensor, output = call.tensors[0], call.outputs[0]
    if call.fields(tensor):
        return move(call)
    fields = []
    for dim in range(output.ndim):
        inner = tensor.shape[dim - output.ndim] if output.ndim - dim <= tensor.ndim else 1
        if inner and (count := output.shape[dim] // inner) > 1 and not call.is_uniform(tensor):
            free = call.record.new_free(count).repeat_interleave(inner)
            fields.append(free.view([-1 if dim == each else 1 for each in range(output.ndim)]))
    return [tuple(fields)]


def reshape(call: Call) -> Sequence[Fields]:
    """Reshape the labels; where one labelled dimension becomes several, couple them along all of these but one.

    The kept elements must be a product of kept indices along each of the new dimensions. The record's ``split``
    chooses the dimension whose labels stay apart.
    """
    before = call.fields(call.tensors[0])
    (moved,) = moved_fields(call, lambda tensor, *_, **__: tensor.reshape(call.outputs[0].shape))
    folded = []
    for old, new in zip(before, moved, strict=True):
        dims = sorted(varying_dims(new))
        if len(dims) > len(varying_dims(old)) == 1:
            free = [dims[call.record.split([new.shape[dim] for dim in dims])]]
        else:
            free = dims[len(dims) - len(varying_dims(old)) :]
        folded.append(couple_across(call.labels, new, free))
    return [_with_free_joined(call, varying(folded))]


def _with_free_joined(call: Call, fields: Fields) -> Fields:
    """Return fields in which free ones that vary along one dimension are one: any part of it may go.

    A mask that is expanded over a batch and heads, which a reshape makes one dimension, has such fields.
    """
    free = [field for field in fields if call.record.is_free(field)]
    dims = [varying_dims(field) for field in free]
    if not any(one & other for one, other in combinations(dims, 2)):
        return fields
    shape = torch.broadcast_shapes(*(field.shape for field in free))
    places = torch.stack([field.expand(shape).flatten() for field in free])
    _, number = torch.unique(places, dim=1, return_inverse=True)
    joined = call.record.new_free(int(number.max()) + 1)[number].view(shape)
    return (*(field for field in fields if not call.record.is_free(field)), joined)


def pixel_shuffle(call: Call) -> Sequence[Fields]:
    """Couple the channels that become the positions of one output channel."""
    return _move_coupled(call, [call.outputs[0].ndim - 3])


def concatenate(call: Call) -> Sequence[Fields]:
    """Concatenate the labels; along dimensions in which no input's labels vary, couple those of the parts."""
    dim = call.argument("dim") % call.outputs[0].ndim
    _label_followers(call, dim)
    _label_uniform(call, [frozenset([dim])])
    matched = _matched(call, dim)
    labelled = (varying_dims(field) for fields in matched.values() for field in fields)
    return _move_coupled(call, frozenset[int]().union(*labelled), matched)


def _matched(call: Call, dim: int) -> dict[int, Fields]:
    """Return the fields of the parts that are joined, by ``id``, without those that others have no match for.

    Labels along other dimensions than the one they are joined in are frozen unless all have some along these:
    the parts keep one size there, as the halves of a position embedding, for rows and for columns, do.
    """
    labelled = {
        id(tensor): partition(fields, [dim]) for tensor in call.tensors if (fields := call.fields(tensor))
    }
    common = set.intersection(*({*map(varying_dims, across)} for _, across in labelled.values()))
    matched = {}
    for number, (along, across) in labelled.items():
        call.freeze(tuple(field for field in across if varying_dims(field) not in common), NOT_CUT)
        matched[number] = (*along, *(field for field in across if varying_dims(field) in common))
    return matched


def _label_followers(call: Call, dim: int) -> None:
    """Give zeros and the like the labels of an operand of their shape, if the record's ``split`` says so.

    Their number may be that of the channels that they are joined with, as in ``y.new_zeros(y.shape)``, or
    happen to be the same.
    """
    labelled = {each.shape: fields for each in call.tensors if partition(fields := call.fields(each), [dim])[0]}
    for tensor in call.tensors:
        alike = call.is_uniform(tensor) and not call.fields(tensor) and tensor.shape in labelled
        if alike and call.record.zeros_follow():
            call.record.set_fields(tensor, labelled[tensor.shape])


def _label_uniform(call: Call, otherwise: Sequence[frozenset[int]]) -> None:
    """Give operands with one value everywhere labels of their own, along the dimensions of those of the others.

    Zeros that are joined with channels can be of any size, as the first state of a recurrent cell.

    Args:
        call: The op.
        otherwise: The dimensions along which each field varies if no operand has labels.
    """
    labelled = max(map(call.fields, call.tensors), key=len)
    known = [varying_dims(field) for field in labelled] or otherwise
    for tensor in call.tensors:
        if call.is_uniform(tensor) and not call.fields(tensor):
            sizes = [[size if dim in dims else 1 for dim, size in enumerate(tensor.shape)] for dims in known]
            call.record.set_fields(tensor, tuple(call.labels.new(prod(each)).view(each) for each in sizes))


def stack(call: Call) -> Sequence[Fields]:
    """Couple the labels of the tensors that are stacked, which have one shape."""
    _label_uniform(call, [])
    rank = call.outputs[0].ndim
    return _move_coupled(call, frozenset(range(rank)) - {call.argument("dim") % rank})


def split(call: Call) -> Sequence[Fields]:
    """Couple the labels of parts of equal size; parts of different sizes are units of different groups."""
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    ends = list(accumulate((output.shape[dim] for output in call.outputs), initial=0))
    for field in partition(call.fields(tensor), [dim])[0]:
        for part in couple_alike(call.labels, field, dim, pairwise(ends)).values():
            call.record.note_part(part)
    return move(call)


def unbind(call: Call) -> Sequence[Fields]:
    """Couple the labels of all parts, so that each keeps the same indices."""
    first, *others = parts = move(call)
    for fields in others:
        if len(first) == len(fields):
            for left, right in zip(first, fields, strict=True):
                call.labels.couple(left, right)
    return parts


def picked(places: Callable[[Call], Mapping[int, int | None]]) -> Rule:
    """Return the rule for ops that address elements by index.

    Labels along the indexed dimensions are frozen, and so are those of the index itself. Of a dimension with a
    single index, those from this to the end that it is counted from are frozen: the others may go.

    Args:
        places: Returns the indexed dimensions of an op, each with its index if it is a single one in the code.
    """

    def rule(call: Call) -> Sequence[Fields]:
        tensor = call.tensors[0]
        for dim, place in places(call).items():
            part = slice(None) if place is None else slice(place, None) if place < 0 else slice(place + 1)
            for field in partition(call.fields(tensor), [dim % tensor.ndim])[0]:
                call.labels.freeze(field.movedim(dim, 0)[part], call.by_position)
        for index in call.tensors[1:]:
            call.freeze(call.fields(index), call.deciding)
        return [varying(result) for result in moved_fields(call, call.func, [tensor])]

    return rule


def _single(call: Call, index: Any) -> int | None:
    """Return an index that is one whole number in the code; ``None`` for any other."""
    if isinstance(index, Tensor) and index.numel() == 1 and call.is_uniform(index):
        return None if index.dtype is torch.bool else int(index)
    return index if isinstance(index, int) else None


def cut_out(call: Call) -> Sequence[Fields]:
    """Note the part that a slice takes: with which others it is coupled shows at the end of the pass.

    Of a slice with steps the elements of each step are coupled.
    """
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    whole, length, step = tensor.shape[dim], call.outputs[0].shape[dim], call.argument("step")
    start = call.argument("start") or 0
    start = max(0, start + whole) if start < 0 else start
    along, _ = partition(call.fields(tensor), [dim])
    if not length or (step > 1 and whole % step):
        call.freeze(along, call.by_position)
        return move(call)
    for field in along:
        if step > 1:
            steps = field.unflatten(dim, (-1, step))
            call.labels.couple(steps, steps.narrow(dim + 1, 0, 1))
        elif length < whole:
            call.record.note_slice(field, dim, (start, start + length))
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
    return [varying(fields)]


def embedding(call: Call) -> Sequence[Fields]:
    """Freeze the labels of the rows, which are addressed by index, and return those of the columns."""
    weight = call.tensors[0]
    fields = call.freeze_along(
        call.fields(weight), frozenset({0}), "holds the rows of an embedding, which are addressed by position"
    )
    for field in fields:
        call.record.note(Role.COLUMN, field)
    rank = call.outputs[0].ndim
    columns = tuple(align_rank(field.view(-1), rank) for field in fields)
    return [columns, *[() for _ in call.outputs[1:]]]


def rolled(call: Call) -> Mapping[int, int | None]:
    """Return the dimensions of a roll or flip, all if none are given."""
    return dict.fromkeys(call.argument("dims") or range(call.tensors[0].ndim))


def indexed(call: Call) -> Mapping[int, int | None]:
    """Return the dimensions that have an index tensor; one of truth values may stand for several."""
    found: dict[int, int | None] = {}
    place = 0
    for index in call.argument("indices"):
        count = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        found |= {} if index is None else dict.fromkeys(range(place, place + count), _single(call, index))
        place += count
    return found


def along_dim(call: Call) -> Mapping[int, int | None]:
    """Return the one dimension that the op is given."""
    return {call.argument("dim"): _single(call, call.argument("index"))}


def along_dimension(call: Call) -> Mapping[int, int | None]:
    """Return the one dimension of windows that ``Tensor.unfold`` is given."""
    return {call.argument("dimension"): None}


def as_complex(call: Call) -> Sequence[Fields]:
    """Freeze labels along the real and the imaginary parts, which is the last dimension."""
    tensor = call.tensors[0]
    fields = call.freeze_along(call.fields(tensor), frozenset([tensor.ndim - 1]), call.by_position)
    return [tuple(field.squeeze(-1) for field in fields)]


def as_real(call: Call) -> Sequence[Fields]:
    """Return the labels of complex numbers, which become two real ones along a new last dimension."""
    return [tuple(field[..., None] for field in call.fields(call.tensors[0]))]


def channel_shuffle(call: Call) -> Sequence[Fields]:
    """Couple the channels at the same place in each of the groups that are shuffled."""
    for field in partition(call.fields(call.tensors[0]), [1])[0]:
        groups = field.unflatten(1, (call.argument("groups"), -1))
        call.labels.couple(groups, groups[:, :1])
    return move(call)
