"""Readers that check saved values of a training state against the present values that they will replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core import schema


def same_kind_as(present: object) -> schema.Reader[Any]:
    """Return a reader for saved values that may replace a present value.

    They must be of the same type, and tensors of the same shape; a number and a tensor with one element may
    replace each other. Dicts and lists are compared entry by entry. Keys that only one of two dicts has, and
    the tail of the longer of two lists, are not checked: entries of a training state appear and disappear.

    Args:
        present: The present value.
    """
    reader: schema.Reader[Any] = schema.anything
    match present:
        case bool():
            reader = schema.optional(schema.boolean)
        case int() | float():
            reader = schema.satisfying(schema.anything, _number, "a number")
        case str():
            reader = schema.string
        case Tensor():
            reader = _same_kind_of_tensor(present)
        case list() | tuple():
            reader = _same_kinds(present)
        case Mapping():
            reader = _same_kinds_by_key(present)
    return reader


def _same_kind_of_tensor(present: Tensor) -> schema.Reader[Any]:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.layout, tensor.is_complex()

    def fits(value: object) -> bool:
        if present.numel() == 1 and _number(value):
            return True
        return torch.is_tensor(value) and not value.is_meta and kind(value) == kind(present)

    return schema.satisfying(schema.anything, fits, schema.summary(present))


def _same_kinds(present: Sequence[Any]) -> schema.Reader[Any]:
    items = schema.sequence(schema.anything)
    # items may be None, because LBFGS fills a list of None during training
    return lambda value: tuple(
        schema.read_at(f"[{place}]", schema.optional(same_kind_as(now)), each)
        for place, (each, now) in enumerate(zip(items(value), present, strict=False))
    )


def _same_kinds_by_key(present: Mapping[Any, Any]) -> schema.Reader[Any]:
    items = schema.mapping(schema.anything, key=schema.anything)
    return lambda value: {
        name: schema.read_at(f"[{name!r}]", same_kind_as(present.get(name)), each)
        for name, each in items(value).items()
    }


def _number(value: object) -> bool:
    """Return whether a value is a real number: an ``int``, a ``float`` or a tensor with one real element."""
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)
