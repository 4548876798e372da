"""What is saved of training, beside what training has now, whose place it is to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core.schema import (
    Reader,
    anything,
    flag,
    mapping,
    optional,
    sequence,
    shown,
    text,
    where,
    within,
)


@singledispatch
def like(present: object) -> Reader[Any]:
    """Something of the same kind as what there is now: it is to take its place.

    Entries that only one of two dicts has, and the rest of the longer of two lists, may be anything: what is
    remembered of training comes and goes.
    """
    return anything


@like.register
def _(present: bool) -> Reader[Any]:
    return optional(flag)


@like.register(int)
@like.register(float)
def _(present: float) -> Reader[Any]:
    return where(anything, _number, "a number")


@like.register
def _(present: str) -> Reader[Any]:
    return text


@like.register
def _(present: Tensor) -> Reader[Any]:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.layout, tensor.is_complex(), tensor.is_meta

    def fits(value: object) -> bool:
        if present.numel() == 1 and _number(value):
            return True
        return torch.is_tensor(value) and kind(value) == (*kind(present)[:3], False)

    return where(anything, fits, shown(present))


@like.register(list)
@like.register(tuple)
def _(present: Sequence[Any]) -> Reader[Any]:
    items = sequence(anything)
    return lambda value: tuple(
        within(f"[{place}]", optional(like(now)), each)  # LBFGS fills a list of None as it goes
        for place, (each, now) in enumerate(zip(items(value), present, strict=False))
    )


@like.register
def _(present: Mapping) -> Reader[Any]:  # type: ignore[type-arg]
    items = mapping(anything, key=anything)
    return lambda value: {
        name: within(f"[{name!r}]", like(present.get(name)), each) for name, each in items(value).items()
    }


def _number(value: object) -> bool:
    """Whether it will do for a number: one of Python's, or a tensor of one."""
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)
