"""Norms: they take their scale and shift along, or freeze what they normalise over."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.label_fields import Fields, merge_fields
from lightning_prune.channels.graph.trace_record import Role


def batch_norm(call: Call) -> Sequence[Fields]:
    """Takes its scale, shift and running statistics along."""
    image, *others = (tensor for tensor in call.tensors)
    fields = call.without(
        call.fields(image), frozenset({0, *range(2, image.ndim)}), "varies along what is normalised over"
    )
    shape = [1, -1] + [1] * (image.ndim - 2)
    own = [field.view(shape) for tensor in others for field in call.fields(tensor)]
    scale = call.argument("weight")
    for field in () if scale is None else call.fields(scale):
        call.record.note(Role.SCALE, field)
    if not fields:
        call.freeze(tuple(own), "normalises what nothing cuts")
    return [merge_fields(call.labels, (*fields, *own)), *[() for _ in call.outputs[1:]]]


def group_norm(call: Call) -> Sequence[Fields]:
    """Normalises within groups of channels: whole groups go."""
    image, *others = (tensor for tensor in call.tensors)
    fields = call.without(
        call.fields(image), frozenset(range(image.ndim)) - {1}, "varies along what is normalised over"
    )
    grid = (call.argument("group"), -1)
    lines = [field.reshape(-1) for field in fields]
    lines += [field for tensor in others for field in call.fields(tensor)]
    for line in lines:
        labels = line.expand(image.shape[1])
        call.labels.couple(labels.view(grid), labels.view(grid)[:, :1])
        call.labels.couple(labels, lines[0].expand(image.shape[1]))
    if not fields:
        call.freeze(tuple(lines), "normalises what nothing cuts")
    return [fields, *[() for _ in call.outputs[1:]]]


def layer_norm(call: Call) -> Sequence[Fields]:
    """Freezes what it normalises over, its scale and shift with it."""
    tensor, *others = (tensor for tensor in call.tensors)
    shape = call.argument("normalized_shape")
    dims = frozenset(range(tensor.ndim - len(shape), tensor.ndim))
    why = f"is normalised over by {call.name}"
    for other in others:
        call.freeze(call.fields(other), why)
    return [call.without(call.fields(tensor), dims, why), *[() for _ in call.outputs[1:]]]
