"""Label rules for norms: couple their scale and shift with channels, or freeze what they normalize over."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.label_fields import Fields, merge_fields, partition
from lightning_prune.channels.graph.trace_record import Role

_STANDARDISED = "is read by a weight that is standardised over all its inputs, those that are 0 as well"


def _channel_fields(call: Call) -> tuple[Fields, Fields]:
    """Freeze the labels of the image along all dimensions but the channels.

    Returns:
        The fields of the image along the channels; those of the scale, the shift and the running statistics,
        of the image's rank, which are frozen if the image has none.
    """
    image, *others = call.tensors
    dims = frozenset(range(image.ndim)) - {1}
    why = "lies along what a norm averages: the batch, or positions"
    fields = call.freeze_along(call.fields(image), dims, _STANDARDISED if call.of_weights(image) else why)
    shape = [1, -1] + [1] * (image.ndim - 2)
    own = tuple(field.view(shape) for tensor in others for field in call.fields(tensor))
    if not fields:
        call.freeze(own, "normalises values that cannot shrink with it, such as an input")
    return fields, own


def batch_norm(call: Call) -> Sequence[Fields]:
    """Couple the channels with the scale, the shift and the running statistics.

    Labels along the batch and along positions are frozen. Of a weight that is standardised these are inputs,
    which keep their labels for the convolution that reads them.
    """
    fields, own = _channel_fields(call)
    scale = call.argument("weight")
    for field in () if scale is None else call.fields(scale):
        call.record.note(Role.SCALE, field)
    image = call.tensors[0]
    inputs = partition(call.fields(image), {0, 2})[0] if call.of_weights(image) else ()
    return [(*merge_fields(call.labels, (*fields, *own)), *inputs), *[() for _ in call.outputs[1:]]]


def group_norm(call: Call) -> Sequence[Fields]:
    """Couple all channels of a group, which are normalized together, and their scale and shift with them."""
    fields, own = _channel_fields(call)
    coupled = (*fields, *own)
    for field in coupled:
        groups = field.view(call.argument("group"), -1)
        call.labels.couple(groups, groups[:, :1])
        call.labels.couple(field, coupled[0])
    return [fields, *[() for _ in call.outputs[1:]]]


def layer_norm(call: Call) -> Sequence[Fields]:
    """Freeze the labels along the dimensions that are normalized over, and those of the scale and the shift."""
    tensor, *others = call.tensors
    shape = call.argument("normalized_shape")
    dims = frozenset(range(tensor.ndim - len(shape), tensor.ndim))
    why = f"feeds a {call.title}, which mixes all channels"
    for other in others:
        call.freeze(call.fields(other), why)
    return [call.freeze_along(call.fields(tensor), dims, why), *[() for _ in call.outputs[1:]]]
