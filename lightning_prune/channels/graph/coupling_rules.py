"""Label rules for ops that combine elements: pointwise ops, reductions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.channels.graph.calls import Call, Rule, tensors_of
from lightning_prune.channels.graph.label_fields import (
    Fields,
    align_rank,
    merge_fields,
    partition,
    varying_dims,
)
from lightning_prune.channels.graph.labels import NOT_CUT
from lightning_prune.channels.graph.trace_record import Role


def pointwise(call: Call) -> Sequence[Fields]:
    """Couple the labels of all operands that meet in the same element of the output."""
    fields = couple_operands(call, call.tensors, frozenset())
    if call.name.rstrip("_") in ("add", "sub") and all(map(call.of_weights, call.tensors)):
        _note_shifted(call)
    return [fields for _ in call.outputs]


def _note_shifted(call: Call) -> None:
    """Note the inputs of weights that are shifted by one number for all, as by their mean: 0 is 0 no more."""
    rank = call.outputs[0].ndim
    operands = [tuple(align_rank(field, rank) for field in call.fields(each)) for each in call.tensors]
    for place, fields in enumerate(operands):
        met = frozenset[int]().union(*map(varying_dims, sum(operands[:place] + operands[place + 1 :], ())))
        for field in fields if len(operands) > 1 else ():
            if varying_dims(field).isdisjoint(met):
                call.record.note(Role.SUMMED, field)


def each_pointwise(call: Call) -> Sequence[Fields]:
    """Couple the labels of the tensors at the same place in the lists that an op is given."""
    lists = [each for each in (*call.args, *call.kwargs.values()) if isinstance(each, list | tuple)]
    tensors = [each for each in lists if tensors_of(each)]
    found = []
    for number, operands in enumerate(zip(*tensors, strict=True)):
        output = call.outputs[number] if call.outputs else operands[0]
        single = Call(call.record, call.func, operands, {}, [output])
        found.append(couple_operands(single, operands, frozenset()))
    return found if call.outputs else []


def scatter(call: Call) -> Sequence[Fields]:
    """Freeze labels along the dimension in which elements are written by index, and couple the others.

    Graph neural networks add the rows of neighbouring nodes in this way.
    """
    rank = call.outputs[0].ndim
    indexed = {call.argument("dim") % rank}
    for index in call.tensors:
        if not index.is_floating_point() and index.ndim == rank:  # positions, which it need not cover
            indexed |= {dim for dim in range(rank) if index.shape[dim] != call.outputs[0].shape[dim]}
            call.freeze(call.fields(index), call.deciding)
    operands = [tensor for tensor in call.tensors if tensor.is_floating_point()]
    return [couple_operands(call, operands, frozenset(indexed))]


def couple_operands(
    call: Call, tensors: Sequence[Tensor], indexed: frozenset[int], why: str | None = None
) -> Fields:
    """Couple the labels of operands that meet after broadcasting.

    Args:
        call: The op.
        tensors: Its operands.
        indexed: Dimensions of the output along which labels are frozen instead.
        why: The reason for these; by default that elements are addressed by index.

    Returns:
        The fields of the output.
    """
    return _met(call, [(tensor, call.fields(tensor)) for tensor in tensors], indexed, why)


def _met(
    call: Call,
    pairs: Sequence[tuple[Tensor, Fields]],
    indexed: frozenset[int] = frozenset(),
    why: str | None = None,
) -> Fields:
    """Couple the labels of tensors whose elements meet after broadcasting.

    Args:
        call: The op.
        pairs: The tensors, each with its fields.
        indexed: As for ``couple_operands``.
        why: As for ``couple_operands``.

    Returns:
        The fields of what they meet in.
    """
    rank = call.outputs[0].ndim
    operands = []
    for _, fields in pairs:
        aligned = tuple(align_rank(field, rank) for field in fields)
        operands.append(call.freeze_along(aligned, indexed, why or call.by_position))
    for (tensor, _), own in zip(pairs, operands[:], strict=True):
        if not call.is_uniform(tensor):
            unlabelled = _wide_dims(tensor, rank) - indexed.union(*map(varying_dims, own))
            # what meets values of a size of its own has that size, and is free no more
            operands = [_without(call, fields, unlabelled, tensor) for fields in operands]
    free = _free_fields(call, [tensor for tensor, _ in pairs])
    return merge_fields(call.labels, (field for fields in (*operands, free) for field in fields))


def _without(call: Call, fields: Fields, dims: frozenset[int], tensor: Tensor) -> Fields:
    """Freeze the fields that meet a tensor along these dimensions, and return the others.

    The reason to freeze heads names the line that has made the tensor.
    """
    met, others = partition(fields, dims)
    line = call.record.line_of(tensor) if met and call.record.are_heads(met) else None
    why = f": made for all heads in {line}; let what it has for each head come from a buffer" if line else ""
    call.freeze(met, f"{NOT_CUT}{why}")
    return others


def _free_fields(call: Call, tensors: Sequence[Tensor]) -> Fields:
    """Return new labels along dimensions in which operands with one value everywhere are the only wide ones.

    These may be of any size, as those of a first state of zeros that decays for each head.
    """
    rank = call.outputs[0].ndim
    uniform: list[frozenset[int]] = []
    others: list[frozenset[int]] = []
    for tensor in tensors:
        (uniform if call.is_uniform(tensor) else others).append(_wide_dims(tensor, rank))
    wide = frozenset[int]().union(*uniform) - frozenset[int]().union(*others) if others else frozenset[int]()
    shape = call.outputs[0].shape
    return tuple(
        call.labels.new(shape[dim]).view([-1 if dim == each else 1 for each in range(rank)])
        for dim in sorted(wide)
    )


def _wide_dims(tensor: Tensor, rank: int) -> frozenset[int]:
    """Return the dimensions along which the elements of a tensor may differ, once it is broadcast to ``rank``.

    Expanded dimensions (stride 0) are not among them: they fit operands of any size.
    """
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return frozenset(
        rank - tensor.ndim + dim for dim, (size, stride) in enumerate(sizes) if size > 1 and stride > 0
    )


def weight_norm(call: Call) -> Sequence[Fields]:
    """Freeze the labels along the outputs of a direction tensor, and couple the others with the output's.

    A masked input adds 0 to the norm of each output. A masked output has norm 0, by which its direction cannot
    be divided. If the direction is not computed from weights alone, all its labels are frozen.
    """
    direction = call.tensors[0]
    dims = frozenset([call.argument("dim") % direction.ndim])
    if not call.of_weights(direction):
        dims = frozenset(range(direction.ndim))
    call.freeze_along(call.fields(direction), dims, f"is normalised by {call.title}, and 0 has no direction")
    return [pointwise(call)[0], ()]


def along_last_dims(count: int) -> Rule:
    """Return the rule for ops that combine elements along the last ``count`` dimensions, such as pooling.

    Labels along these are frozen, all others stay as they are.
    """

    def rule(call: Call) -> Sequence[Fields]:
        rank = call.outputs[0].ndim
        dims = frozenset(range(rank - count, rank))
        fields = couple_operands(call, call.tensors, dims, f"feeds {call.title}, which mixes neighbours")
        return [fields for _ in call.outputs]

    return rule


def reduce(call: Call) -> Sequence[Fields]:
    """Freeze the labels along the reduced dimensions, unless the operand is computed from weights alone.

    A reduction of weights, as in a penalty on them, freezes nothing: masked weights may be removed.
    """
    tensor = call.tensors[0]
    if not call.of_weights(tensor):
        why = f"feeds {call.title}, which mixes all channels"
        call.freeze_along(call.fields(tensor), _reduced_dims(call), why)
    return sum_rule(call)


def sum_rule(call: Call) -> Sequence[Fields]:
    """Drop the labels along the summed dimensions: masked elements add 0 to the sum and may be removed."""
    tensor, dims = call.tensors[0], _reduced_dims(call)
    summed, fields = partition(call.fields(tensor), dims)
    for field in () if call.of_weights(tensor) else summed:
        call.record.note(Role.SUMMED, field)
    reduced = tuple(field.squeeze(tuple(dims)) for field in fields)
    return [fields if output.ndim == tensor.ndim else reduced for output in call.outputs]


def _reduced_dims(call: Call) -> frozenset[int]:
    """Return the dimensions that the op is given, one or several, or all if it is given none."""
    rank, given = call.tensors[0].ndim, call.argument("dim")
    listed = [given] if isinstance(given, int) else given
    return frozenset(dim % rank for dim in listed or range(rank))


def glu(call: Call) -> Sequence[Fields]:
    """Couple the labels of the two halves of a dimension, of which one gates the other."""
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    halves = [(field, field) if field.shape[dim] == 1 else field.chunk(2, dim) for field in call.fields(tensor)]
    for left, right in halves:
        call.labels.couple(left, right)
    return [tuple(left for left, _ in halves)]


def _contract(call: Call, operands: list[Tensor], dims: tuple[int, int], batch: frozenset[int]) -> Fields:
    """Couple the labels along the dimension of each operand that a product sums over.

    Args:
        call: The op.
        operands: The two operands.
        dims: The dimension of each that is summed over.
        batch: The leading dimensions that both operands and the result have in common.

    Returns:
        The fields of the result: those of both operands along all other dimensions.
    """
    summed = []
    passed = []
    for operand, dim in zip(operands, dims, strict=True):
        along, across = partition(call.fields(operand), [dim])
        others = frozenset(range(operand.ndim)) - batch - {dim}
        along = call.freeze_overlapping(along)
        passed.append(call.freeze_overlapping(across))
        why = "lies along several dimensions of a matrix product at once"
        summed.append(call.freeze_along(along, others, why))
        for field in passed[-1]:
            call.record.note(Role.OUTPUT, field)
        # what a layer makes of learned queries is read, and a weight with an adapter added reads
        reads = call.is_plain_weight(operand) or not all(map(call.of_weights, operands))
        for field in summed[-1] if reads and call.of_weights(operand) else ():
            call.record.note(Role.INPUT, field)
    for mine, other, tensor in zip(summed, reversed(summed), operands[::-1], strict=True):
        if not other and not call.is_uniform(tensor):
            call.freeze(
                mine, "is multiplied by values that cannot shrink with it, such as an input or a constant"
            )
    if all(summed):
        # batch dimensions come first in both operands, and the fields do not vary along any other dimension
        aligned = [
            field[None].movedim(dim + 1, -1).flatten(0, -2)
            for fields, dim in zip(summed, dims, strict=True)
            for field in fields
        ]
        couple_all(call, aligned)
    return merge_fields(call.labels, (*passed[0], *passed[1]))


def matmul(call: Call) -> Sequence[Fields]:
    """Couple the labels along the summed dimension of a matrix or vector product, batched or not.

    A tensor that is added to the product (``addmm``, ``baddbmm``) is coupled with the result.
    """
    *added, left, right = call.tensors
    inner = (left.ndim - 1, max(0, right.ndim - 2))
    fields = _contract(call, [left, right], inner, frozenset(range(left.ndim - 2)))
    if right.ndim == 1:
        fields = tuple(field.squeeze(-1) for field in fields)
    summed = partition(call.fields(left), inner[:1])[0] or partition(call.fields(right), inner[1:])[0]
    call.record.note_macs([*fields, *summed[:1]])
    if not call.is_plain_weight(left) and not call.is_plain_weight(right):
        for field in fields:
            if max(varying_dims(field)) < left.ndim - 2:
                call.record.note(Role.HEAD, field)
    terms = [(call.outputs[0], fields), *((tensor, call.fields(tensor)) for tensor in added)]
    return [_met(call, terms) if added else fields]


def distances(call: Call) -> Sequence[Fields]:
    """Couple the features of vectors between which distances are taken: what is 0 in both adds nothing."""
    left, right = call.tensors
    operands = []
    for tensor, dim in ((left, -2), (right, -3)):
        wide = tensor.unsqueeze(dim)
        call.record.set_fields(wide, tuple(field.unsqueeze(dim) for field in call.fields(tensor)))
        operands.append(wide)
    pairs = torch.broadcast_tensors(*operands)
    met = couple_operands(Call(call.record, call.func, (), {}, [*pairs]), operands, frozenset())
    summed, fields = partition(met, [left.ndim])
    for field in summed:
        call.record.note(Role.SUMMED, field)
    return [tuple(field.squeeze(-1) for field in fields)]


def line(call: Call, tensor: Tensor, dim: int, why: str) -> Tensor:
    """Return the label of each index along one dimension of a tensor, 0 where it has none.

    Args:
        call: The op.
        tensor: One of its operands. Several labels of one index are coupled.
        dim: The dimension.
        why: The reason to freeze labels that vary along another dimension as well.
    """
    fields, _ = partition(call.fields(tensor), [dim])
    fields = call.freeze_along(fields, frozenset(range(tensor.ndim)) - {dim}, why)
    return couple_all(call, [field.flatten() for field in fields]).expand(tensor.shape[dim])


def couple_all(call: Call, fields: list[Tensor]) -> Tensor:
    """Couple the labels of all fields and return the first one; without fields return the label 0."""
    first, *others = fields or [torch.zeros(1, dtype=torch.int64)]
    for other in others:
        call.labels.couple(first, other)
    return first


def trilinear(call: Call) -> Sequence[Fields]:
    """Couple the labels of three tensors that are multiplied, as in ``nn.Bilinear``; drop what is summed."""
    operands = []
    for number, tensor in enumerate(call.tensors, start=1):
        wide, fields = tensor, call.fields(tensor)
        for dim in sorted(call.argument(f"expand{number}")):
            wide, fields = wide.unsqueeze(dim), tuple(field.unsqueeze(dim) for field in fields)
        call.record.set_fields(wide, fields)
        operands.append(wide)
    summed = frozenset(call.argument("sumdim"))
    product = Call(call.record, call.func, call.args, call.kwargs, [operands[0]])
    merged = couple_operands(product, operands, frozenset())
    for wide, tensor in zip(operands, call.tensors, strict=True):
        along, across = partition(call.fields(wide), summed)
        for role, fields in ((Role.INPUT, along), (Role.OUTPUT, across)) if call.of_weights(tensor) else ():
            for field in fields:
                call.record.note(role, field)
    kept = partition(merged, summed)[1]
    return [tuple(field.squeeze(tuple(summed)) for field in kept)]
