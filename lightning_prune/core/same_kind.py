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
    boolean,
    mapping,
    optional,
    satisfying,
    sequence,
    string,
    summary,
    within,
)


@singledispatch
def same_kind_as(present: object) -> Reader[Any]:
    """Something of the same kind as what there is now: it is to take its place.

    Entries that only one of two dicts has, and the rest of the longer of two lists, may be anything: what is
    remembered of training comes and goes.
    """
    return anything


@same_kind_as.register
def _(present: bool) -> Reader[Any]:
    return optional(boolean)


@same_kind_as.register(int)
@same_kind_as.register(float)
def _(present: float) -> Reader[Any]:
    return satisfying(anything, _number, "a number")


@same_kind_as.register
def _(present: str) -> Reader[Any]:
    return string


@same_kind_as.register
def _(present: Tensor) -> Reader[Any]:
    def kind(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.layout, tensor.is_complex(), tensor.is_meta

    def fits(value: object) -> bool:
        if present.numel() == 1 and _number(value):
            return True
        return torch.is_tensor(value) and kind(value) == (*kind(present)[:3], False)

    return satisfying(anything, fits, summary(present))


@same_kind_as.register(list)
@same_kind_as.register(tuple)
def _(present: Sequence[Any]) -> Reader[Any]:
    items = sequence(anything)
    return lambda value: tuple(
        within(f"[{place}]", optional(same_kind_as(now)), each)  # LBFGS fills a list of None as it goes
        for place, (each, now) in enumerate(zip(items(value), present, strict=False))
    )


@same_kind_as.register
def _(present: Mapping) -> Reader[Any]:  # type: ignore[type-arg]
    items = mapping(anything, key=anything)
    return lambda value: {
        name: within(f"[{name!r}]", same_kind_as(present.get(name)), each)
        for name, each in items(value).items()
    }


def _number(value: object) -> bool:
    """Whether it will do for a number: one of Python's, or a tensor of one."""
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, int | float) and not isinstance(value, bool)
