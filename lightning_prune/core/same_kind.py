"""What is saved of training, beside what training has now, whose place it is to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core import schema


@singledispatch
def same_kind_as(present: object) -> schema.Reader[Any]:
    """Something of the same kind as what there is now: it is to take its place.

    Entries that only one of two dicts has, and the rest of the longer of two lists, may be anything: what is
    remembered of training comes and goes.
    """
    return schema.anything


@same_kind_as.register
def _(present: bool) -> schema.Reader[Any]:
    return schema.optional(schema.boolean)


@same_kind_as.register(int)
@same_kind_as.register(float)
def _(present: float) -> schema.Reader[Any]:
    return schema.satisfying(schema.anything, _number, "a number")


@same_kind_as.register
def _(present: str) -> schema.Reader[Any]:
    return schema.string


@same_kind_as.register
def _(present: Tensor) -> schema.Reader[Any]:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.layout, tensor.is_complex(), tensor.is_meta

    def fits(value: object) -> bool:
        if present.numel() == 1 and _number(value):
            return True
        return torch.is_tensor(value) and kind(value) == (*kind(present)[:3], False)

    return schema.satisfying(schema.anything, fits, schema.summary(present))


@same_kind_as.register(list)
@same_kind_as.register(tuple)
def _(present: Sequence[Any]) -> schema.Reader[Any]:
    items = schema.sequence(schema.anything)
    return lambda value: tuple(
        schema.within(
            f"[{place}]", schema.optional(same_kind_as(now)), each
        )  # LBFGS fills a list of None as it goes
        for place, (each, now) in enumerate(zip(items(value), present, strict=False))
    )


@same_kind_as.register
def _(present: Mapping) -> schema.Reader[Any]:  # type: ignore[type-arg]
    items = schema.mapping(schema.anything, key=schema.anything)
    return lambda value: {
        name: schema.within(f"[{name!r}]", same_kind_as(present.get(name)), each)
        for name, each in items(value).items()
    }


def _number(value: object) -> bool:
    """Whether it will do for a number: one of Python's, or a tensor of one."""
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)
