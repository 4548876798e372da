"""Label rules for convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.coupling_rules import couple_all, line
from lightning_prune.channels.graph.label_fields import Fields, merge_fields, partition
from lightning_prune.channels.graph.trace_record import Role


def convolution(call: Call) -> Sequence[Fields]:
    """Couple the image's channels with the weight's inputs, and label the result's channels by its outputs.

    Channels of grouped convolutions are coupled across groups, so that all groups keep equally many. Those of a
    depthwise convolution, which has one input per group, are coupled with the outputs of their group instead.
    One filter that is repeated for all channels leaves them as they are.
    """
    image, weight, bias = call.args[:3]
    transposed = bool(call.argument("transposed"))
    return [_convolve(call, image, weight, bias, call.argument("groups"), transposed)]


def deformed_convolution(call: Call) -> Sequence[Fields]:
    """As ``convolution``; labels of offsets and of their mask are frozen, and channels coupled across them."""
    image, weight, offset, mask, bias = call.args[:5]
    groups, parts = call.argument("groups"), call.argument("offset_groups")
    for positions in (offset, mask):
        call.freeze(call.fields(positions), call.deciding)
    for field in partition(call.fields(image), [1])[0] if parts > 1 else ():
        shares = field.unflatten(1, (parts, -1))
        call.labels.couple(shares, shares[:, :1])
    return [_convolve(call, image, weight, bias, groups, transposed=False)]


def _convolve(
    call: Call, image: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool
) -> Fields:
    """Return the fields of the result of a convolution."""
    inward, outward = (0, 1) if transposed else (1, 0)
    labels = call.labels
    single = _single_positions(call, weight)
    positions = frozenset(range(2, image.ndim)) - single
    fields = call.freeze_along(call.fields(image), positions, "lies along the positions of a convolution")
    along, passed = partition(fields, [1])
    along = call.freeze_along(along, single | {0}, "lies along the batch or the positions of a convolution")
    computed = "is the weight of a convolution, computed in a way that is not followed"
    inner, made = (line(call, weight, dim, computed) for dim in (inward, outward))
    call.record.note(Role.INPUT, inner)
    uniform = call.is_uniform(image) and not along and groups == 1
    read = inner if uniform else couple_all(call, [field.flatten() for field in along])
    read = read.expand(image.shape[1])
    grid = read.view(groups, -1)
    if groups > 1 and not call.record.is_of_parameters(weight):
        call.record.note_filtered(read)
    unread = "reads values that cannot shrink with it, such as an input"
    if groups == image.shape[1] and _is_one_filter(call, weight):
        made = read.repeat_interleave(weight.shape[0] // groups)
    elif groups == 1:
        labels.couple(read, inner, unread)
    elif transposed:
        # the weight runs over all inputs, and over the outputs of one group
        made = made.repeat(groups) if len(made) > 1 else inner.view(groups, -1)[:, 0]
        labels.couple(read, inner, unread)
        if grid.shape[1] > 1:
            labels.couple(grid, grid[:1], unread)
    elif grid.shape[1] > 1:
        # every group has as many inputs and outputs as the others
        labels.couple(grid, inner, unread)
        labels.couple(made.view(groups, -1), made.view(groups, -1)[:1])
    else:
        labels.couple(grid, made.view(groups, -1), unread)
    if bias is not None:
        for field in call.fields(bias):
            labels.couple(made, field)
    call.record.note(Role.OUTPUT, made)
    call.record.note_macs([inner, made, *passed])
    return merge_fields(labels, (*passed, made.view([1, -1] + [1] * (image.ndim - 2))))


def _single_positions(call: Call, weight: Tensor) -> frozenset[int]:
    """Return the dimensions of positions that a convolution takes one by one, as a linear layer does."""
    settings = [(1, "stride"), (0, "padding"), (0, "output_padding")]
    given = [(usual, call.argument(name)) for usual, name in settings]
    if any(values is None for _, values in given):  # as of a deformed convolution
        return frozenset()
    plain = all(value == usual for usual, values in given for value in values)
    return frozenset(dim for dim in range(2, weight.ndim) if plain and weight.shape[dim] == 1)


def _is_one_filter(call: Call, weight: Tensor) -> bool:
    """Return whether a weight without labels along the channels holds one filter for all of them."""
    if weight.shape[1] > 1 or partition(call.fields(weight), [0])[0] or not call.of_weights(weight):
        return False
    return torch.equal(weight, weight[:1].expand_as(weight))
