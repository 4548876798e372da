"""Ops in which labels meet, or elements mix: element by element, in a sum, or in a product with a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.channels.graph.calls import Call, Rule
from lightning_prune.channels.graph.label_fields import Fields, align_rank, merge_fields, varying_dims
from lightning_prune.channels.graph.trace_record import Role

NOT_CUT = "meets elements that nothing cuts"


def pointwise(call: Call) -> Sequence[Fields]:
    """Couples what meets."""
    met = _couple_operands(call, call.tensors, frozenset())
    return [met for _ in call.outputs]


def in_place_add(call: Call) -> Sequence[Fields]:
    """Rows that are added to others by position, as neighbours' in a graph: labels stay there."""
    dim = call.argument("dim") % call.outputs[0].ndim
    return [
        _couple_operands(
            call, [tensor for tensor in call.tensors if tensor.is_floating_point()], frozenset([dim])
        )
    ]


def _couple_operands(call: Call, tensors: Sequence[Tensor], places: frozenset[int]) -> Fields:
    """Couples what meets, but along the dimensions that are addressed by position."""
    rank = call.outputs[0].ndim
    found = []
    for tensor in tensors:
        fields = tuple(align_rank(field, rank) for field in call.fields(tensor))
        found.append(call.without(fields, places, f"is addressed by position ({call.name})"))
    for tensor, own in zip(tensors, found, strict=True):
        bare = _wide_dims(tensor, rank)
        bare -= places.union(*map(varying_dims, own))
        for fields in found if not call.is_uniform(tensor) else ():
            call.without(fields, bare, NOT_CUT)
    return merge_fields(call.labels, (field for fields in found for field in fields))


def _wide_dims(tensor: Tensor, rank: int) -> frozenset[int]:
    """Dimensions along which elements may differ; where one was expanded it is the same for any size."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return frozenset(
        rank - tensor.ndim + dim for dim, (size, stride) in enumerate(sizes) if size > 1 and stride > 0
    )


def weight_norm(call: Call) -> Sequence[Fields]:
    """A direction and a length for each output. 0 is no part of a norm, but all of it has no direction."""
    direction = call.tensors[0]
    given = frozenset([call.argument("dim") % direction.ndim])
    plain = call.of_weights(direction)
    rest = frozenset(range(direction.ndim)) - given
    why = f"is normalised by {call.name}, and 0 has no direction"
    call.without(call.fields(direction), given if plain else given | rest, why)
    return [pointwise(call)[0], ()]


def along_last_dims(count: int) -> Rule:
    """Works on the last dimensions, such as pooling: what comes before them is left as it is."""

    def rule(call: Call) -> Sequence[Fields]:
        tensor = call.tensors[0]
        dims = frozenset(range(tensor.ndim - count, tensor.ndim))
        fields = call.without(call.fields(tensor), dims, f"is mixed along its dimension by {call.name}")
        return [fields for _ in call.outputs]

    return rule


def reduce(call: Call) -> Sequence[Fields]:
    """Mixes along its dimensions: labels there stay. Among weights alone, for a penalty, zeros may go."""
    return _reduced(call, call.of_weights(call.tensors[0]))


def sum_rule(call: Call) -> Sequence[Fields]:
    """Adds up along its dimensions: zeros may go."""
    return _reduced(call, True)


def _reduced(call: Call, lossless: bool) -> Sequence[Fields]:
    tensor = call.tensors[0]
    given = call.argument("dim")
    listed = [given] if isinstance(given, int) else given
    dims = frozenset(dim % tensor.ndim for dim in listed or range(tensor.ndim))
    fields = call.fields(tensor)
    if lossless:
        fields = tuple(field for field in fields if not varying_dims(field) & dims)
    else:
        fields = call.without(fields, dims, f"is mixed along its dimension by {call.name}")
    reduced = tuple(field.squeeze(tuple(dims)) for field in fields)
    return [fields if output.ndim == tensor.ndim else reduced for output in call.outputs]


def glu(call: Call) -> Sequence[Fields]:
    """One half of a dimension gates the other: both go together."""
    tensor = call.tensors[0]
    dim = call.argument("dim") % tensor.ndim
    halves = [(field, field) if field.shape[dim] == 1 else field.chunk(2, dim) for field in call.fields(tensor)]
    for left, right in halves:
        call.labels.couple(left, right)
    return [tuple(left for left, _ in halves)]


def _contract(call: Call, operands: list[Tensor], dims: tuple[int, int], batch: frozenset[int]) -> Fields:
    """Sums over a dimension of each: couples the labels there, and lets the others through.

    Args:
        call: The op.
        operands: Two.
        dims: The dimension of each that is summed over.
        batch: Dimensions that both have in common with the result.
    """
    summed = []
    passed = []
    for operand, dim in zip(operands, dims, strict=True):
        fields = call.fields(operand)
        others = frozenset(range(8)) - batch - {dim}
        along = call.disjoint(tuple(field for field in fields if dim in varying_dims(field)))
        passed.append(call.disjoint(tuple(field for field in fields if dim not in varying_dims(field))))
        summed.append(call.without(along, others, "does not vary along one dimension alone where it is read"))
        for field in passed[-1]:
            call.record.note(Role.OUTPUT, field)
        for field in summed[-1] if call.of_weights(operand) else ():
            call.record.note(Role.INPUT, field)
    for mine, other, tensor in zip(summed, reversed(summed), operands[::-1], strict=True):
        if not other and not call.is_uniform(tensor):
            call.freeze(mine, "is read together with elements that nothing cuts")
    if all(summed):
        lined = [
            [field[None].movedim(dim + 1, -1).flatten(0, -2) for field in side]
            for side, dim in zip(summed, dims, strict=True)
        ]
        # batch dimensions come first in both, and what else there is does not vary
        first, *rest = (field for side in lined for field in side)
        for field in rest:
            call.labels.couple(first, field)
    return merge_fields(call.labels, (*passed[0], *passed[1]))


def matmul(call: Call) -> Sequence[Fields]:
    """A product of matrices or vectors, of batches or not, with or without something added."""
    *added, left, right = call.tensors
    inner = (left.ndim - 1, max(0, right.ndim - 2))
    fields = _contract(call, [left, right], inner, frozenset(range(left.ndim - 2)))
    summed = [field for field in call.fields(left) if inner[0] in varying_dims(field)] or [
        field for field in call.fields(right) if inner[1] in varying_dims(field)
    ]
    call.record.note_macs([*fields, *summed[:1]], [left, right])
    if not call.of_weights(left) and not call.of_weights(right):
        for field in fields:
            if max(varying_dims(field)) < left.ndim - 2:
                call.record.note(Role.HEAD, field)
    rank = call.outputs[0].ndim
    for tensor in added:
        more = tuple(align_rank(field, rank) for field in call.fields(tensor))
        if not more and not call.is_uniform(tensor):
            call.without(fields, _wide_dims(tensor, rank), NOT_CUT)
        fields = merge_fields(call.labels, (*fields, *more))
    return [fields]


def _weight_axis(call: Call, candidates: list[Tensor]) -> Tensor:
    """Coupled lines as one, or the label of what nothing cuts."""
    first, *others = candidates or [torch.zeros(1, dtype=torch.int64)]
    for other in others:
        call.labels.couple(first, other)
    return first


def convolution(call: Call) -> Sequence[Fields]:
    """Consumes channels along the weight's inputs, makes new ones along its outputs."""
    image, weight, bias = call.args[:3]
    transposed, groups = call.argument("transposed"), call.argument("groups")
    inward, outward = (0, 1) if transposed else (1, 0)
    labels = call.labels
    spatial = frozenset(range(2, image.ndim))
    found = call.without(call.fields(image), spatial, "varies along positions where it is convolved")
    through = tuple(field for field in found if 1 not in varying_dims(field))
    found = call.without(
        tuple(field for field in found if 1 in varying_dims(field)), frozenset({0}), "varies along the batch"
    )
    sides = []
    for dim in (inward, outward):
        along = tuple(field for field in call.fields(weight) if dim in varying_dims(field))
        along = call.without(along, frozenset(range(weight.ndim)) - {dim}, "is no plain weight")
        sides.append([field.flatten() for field in along])
    for field in sides[0]:
        call.record.note(Role.INPUT, field)
    channels, outputs = image.shape[1], call.outputs[0].shape[1]
    inner, outer = (_weight_axis(call, side) for side in sides)
    uniform = call.is_uniform(image) and groups == 1
    read = (inner if uniform else _weight_axis(call, [field.flatten() for field in found])).expand(channels)
    grid = read.view(groups, -1)
    unread = "reads what nothing cuts"
    if groups == 1:
        labels.couple(read, inner, unread)
        made = outer.expand(outputs)
    elif transposed:
        # weight: all inputs, the outputs of one group
        made = (
            outer.expand(outputs // groups).repeat(groups) if outputs > groups else inner.view(groups, -1)[:, 0]
        )
        labels.couple(read, inner, unread)
        if grid.shape[1] > 1:
            labels.couple(grid, grid[:1], unread)
    elif grid.shape[1] > 1:
        # every group reads and makes as many as the others
        labels.couple(grid, inner, unread)
        made = outer.expand(outputs)
        labels.couple(made.view(groups, -1), made.view(groups, -1)[:1])
    else:
        made = outer.expand(outputs)
        labels.couple(grid, made.view(groups, -1), unread)
    if bias is not None:
        for field in call.fields(bias):
            labels.couple(made, field)
    call.record.note(Role.OUTPUT, made)
    call.record.note_macs([*sides[0][:1], *sides[1][:1]], [weight])
    return [merge_fields(labels, (*through, made.view([1, -1] + [1] * (image.ndim - 2))))]
