"""Label fields: integer tensors that broadcast to a tensor's shape and give each of its elements a label.

A field has the rank of its tensor, and size 1 along each dimension in which its labels do not vary, so that
batch and positions take no memory. A tensor may have several fields: a weight has one along its outputs and
one along its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_prune.channels.graph.labels import Labels

Fields: TypeAlias = tuple[Tensor, ...]


def varying_dims(field: Tensor) -> frozenset[int]:
    """Return the dimensions along which the labels of a field differ."""
    return frozenset(dim for dim, size in enumerate(field.shape) if size > 1)


def partition(fields: Fields, dims: Iterable[int]) -> tuple[Fields, Fields]:
    """Return the fields that vary along one of these dimensions, and those that vary along none of them."""
    constant = tuple(field for field in fields if varying_dims(field).isdisjoint(dims))
    return tuple(field for field in fields if not varying_dims(field).isdisjoint(dims)), constant


def drop_constant_dims(labels: Labels, field: Tensor) -> Tensor:
    """Reduce a field to size 1 along each dimension in which its labels do not vary, up to coupling.

    >>> labels = Labels()
    >>> drop_constant_dims(labels, labels.new(3)[:, None].expand(3, 4)).shape
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
    """Return the field with leading dimensions of size 1 added, as broadcasting does, up to this rank."""
    return field[(None,) * (rank - field.ndim)]


def couple_across(labels: Labels, field: Tensor, free: Iterable[int]) -> Tensor:
    """Couple the labels along every dimension that is not free, so that the same units are kept at each index.

    Returns:
        The field, of size 1 along the dimensions that are not free.
    """
    for dim in varying_dims(field) - frozenset(free):
        first = field.narrow(dim, 0, 1)
        labels.couple(field, first)
        field = first
    return field


def merge_fields(labels: Labels, fields: Iterable[Tensor]) -> Fields:
    """Merge fields that vary along a common dimension into one, and couple the labels that meet there.

    Args:
        labels: The labels that the fields contain.
        fields: Fields of one tensor, all of its rank.

    Returns:
        Fields of which no two vary along the same dimension, without those that vary along none.
    """
    merged: list[Tensor] = []
    for field in fields:
        union, disjoint = field, []
        for other in merged:
            if varying_dims(union) & varying_dims(other):
                labels.couple(union, other)
                shape = torch.broadcast_shapes(union.shape, other.shape)
                union = drop_constant_dims(labels, union.expand(shape))
            else:
                disjoint.append(other)
        merged = [*disjoint, union]
    return tuple(field for field in merged if varying_dims(field))
