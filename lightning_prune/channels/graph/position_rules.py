"""Label rules for ops that take images apart into positions, or read or write at positions that are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.channels.graph.calls import Call, Rule
from lightning_prune.channels.graph.coupling_rules import couple_operands
from lightning_prune.channels.graph.label_fields import Fields, couple_across, merge_fields
from lightning_prune.channels.graph.movement_rules import indexed, moved_fields, picked, varying


def unfold(call: Call) -> Sequence[Fields]:
    """Repeat the label of each channel for all positions of a window, which become channels after it."""
    image = call.tensors[0]
    channels = image.ndim - 3
    fields = _channels_only(call, channels)
    count = call.outputs[0].shape[channels] // image.shape[channels]
    return [tuple(field.repeat_interleave(count, channels)[..., 0] for field in fields)]


def fold(call: Call) -> Sequence[Fields]:
    """Couple the channels that are the positions of a window of one channel of the image."""
    channels = call.tensors[0].ndim - 2
    windows = [
        field.unflatten(channels, (call.outputs[0].shape[channels], -1))
        for field in _channels_only(call, channels)
    ]
    return [tuple(couple_across(call.labels, each, [channels]) for each in windows)]


def _channels_only(call: Call, channels: int) -> Fields:
    """Freeze the labels of the first tensor along positions, which lie after the channels."""
    tensor = call.tensors[0]
    positions = frozenset(range(channels + 1, tensor.ndim))
    return call.freeze_along(call.fields(tensor), positions, f"lies along positions of {call.title}")


def sampled(*dims: int) -> Rule:
    """Return the rule for ops that read images at given positions, such as ``grid_sample``.

    Args:
        dims: The dimensions of the image along which it is read: labels along these are frozen, and so are
            those of the positions.
    """

    def rule(call: Call) -> Sequence[Fields]:
        image, *positions = call.tensors
        for each in positions:
            call.freeze(call.fields(each), call.deciding)
        along = frozenset(dim % image.ndim for dim in dims)
        return [call.freeze_along(call.fields(image), along, call.by_position) for _ in call.outputs]

    return rule


def gather(call: Call) -> Sequence[Fields]:
    """Freeze labels along the dimension that is addressed by index; the others meet those of the index."""
    tensor, index = call.tensors
    dims = frozenset([call.argument("dim") % tensor.ndim])
    call.freeze_along(call.fields(tensor), dims, call.by_position)
    own = call.freeze_along(call.fields(index), dims, call.deciding)
    (moved,) = moved_fields(call, call.func, [tensor]) if call.fields(tensor) else ([],)
    return [merge_fields(call.labels, (*varying(moved), *own))]


def index_put(call: Call) -> Sequence[Fields]:
    """Freeze labels along indexed dimensions, and couple the others with those of what is written.

    A mask of all elements addresses none by position: one number written there is ``masked_fill``.
    """
    tensor, indices, values = call.args[:3]
    given = [index for index in indices if index is not None]
    if given[0].dtype is torch.bool and given[0].shape == tensor.shape and values.numel() == 1:
        return [couple_operands(call, [tensor, given[0]], frozenset())]
    if len(given) == 1 and given[0].ndim == 1:  # what is written has the dimensions of the tensor
        call.freeze(call.fields(given[0]), call.deciding)
        return [couple_operands(call, [tensor, values], frozenset(indexed(call)))]
    place = torch.ops.aten.index(tensor, indices)
    taken = Call(call.record, torch.ops.aten.index.Tensor, (tensor, indices), {}, [place])
    (fields,) = picked(indexed)(taken)
    call.record.set_fields(place, fields)
    couple_operands(taken, [place, values], frozenset())
    dims = frozenset(dim % tensor.ndim for dim in indexed(taken))
    return [call.freeze_along(call.fields(tensor), dims, call.by_position)]
