"""Fields: the labels of a tensor's elements, kept small.

A field has its tensor's rank, and size 1 along each dimension in which its labels do not vary, so that batch
and positions cost nothing. A tensor may have several: a weight has one along its outputs and one along its
inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_prune.channels.graph.labels import Labels

Fields: TypeAlias = tuple[Tensor, ...]


def varying_dims(field: Tensor) -> frozenset[int]:
    """The dimensions in which labels differ."""
    return frozenset(dim for dim, size in enumerate(field.shape) if size > 1)


def drop_constant_dims(labels: Labels, field: Tensor) -> Tensor:
    """Size 1 wherever labels do not vary.

    >>> labels = Labels()
    >>> shrink(labels, labels.new(3)[:, None].expand(3, 4)).shape
    torch.Size([3, 1])
    """
    for dim, stride in enumerate(field.stride()):
        if stride == 0 and field.numel():
            field = field.narrow(dim, 0, 1)
    for dim in varying_dims(field):
        first = field.narrow(dim, 0, 1)
        if torch.equal(labels.find(field), labels.find(first).expand_as(field)):
            field = first
    return field


def align_rank(field: Tensor, rank: int) -> Tensor:
    """Leading dimensions of size 1, as broadcasting adds them."""
    return field[(None,) * (rank - field.ndim)]


def couple_across(labels: Labels, field: Tensor, free: Iterable[int]) -> Tensor:
    """Couples labels across all dimensions but the free ones: what is kept is kept at every place alike."""
    for dim in varying_dims(field) - frozenset(free):
        first = field.narrow(dim, 0, 1)
        labels.couple(field, first)
        field = first
    return field


def merge_fields(labels: Labels, fields: Iterable[Tensor]) -> Fields:
    """Couples fields that meet: those that vary in a common dimension become one."""
    merged: list[Tensor] = []
    for field in fields:
        whole, apart = field, []
        for other in merged:
            if varying_dims(whole) & varying_dims(other):
                labels.couple(whole, other)
                shape = torch.broadcast_shapes(whole.shape, other.shape)
                whole = drop_constant_dims(labels, whole.expand(shape))
            else:
                apart.append(other)
        merged = [*apart, whole]
    return tuple(field for field in merged if varying_dims(field))
