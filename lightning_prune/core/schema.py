"""What saved states look like, declared: readers take what a file holds, or say what they expected instead."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_prune.core.parts import is_integer

_Result = TypeVar("_Result")
Reader: TypeAlias = Callable[[Any], _Result]  # raises MisfitError

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class SchemaError(Exception):
    """A part of a state is not what it should be.

    Args:
        problem: What is wrong with it, in words.

    Attributes:
        place: The part, as one would write it in Python; grows on the way out.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.place = ""

    def __str__(self) -> str:
        return f"{self.place.lstrip('.') or 'it'} {super().__str__()}"


def read(state: object, reader: Reader[_Result], what: str) -> _Result:
    """What a state holds, once all of it is as expected.

    Args:
        state: As it was found, never changed.
        reader: Says what it looks like.
        what: What it is, for the error.

    Raises:
        ValueError: If something in it is not as expected; the message says where, what is there and what should
            be.

    >>> read({"steps": "x"}, record({"steps": whole()}), "the state")
    Traceback (most recent call last):
    ValueError: the state: steps is 'x', expected a whole number of at least 0.
    """
    try:
        return reader(state)
    except SchemaError as error:
        raise ValueError(f"{what}: {error}.") from None


def within(place: str, reader: Reader[_Result], value: object) -> _Result:
    """What a reader makes of a part of a state; if it refuses, the error says where the part is."""
    try:
        return reader(value)
    except SchemaError as error:
        error.place = place + error.place
        raise


def summary(value: object) -> str:
    """A value in few words."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return _repr.repr(value)


def satisfying(
    reader: Reader[_Result], test: Callable[[_Result], bool], wanted: str, place: str = ""
) -> Reader[_Result]:
    """What a reader reads, if it passes a test.

    Args:
        reader: Of the value.
        test: Whether it will do.
        wanted: What is expected, for the error.
        place: The part that the test is about.
    """

    def checked(value: object) -> _Result:
        found = reader(value)
        if not test(found):
            problem = SchemaError(f"should be {wanted}" if place else f"is {summary(value)}, expected {wanted}")
            problem.place = place
            raise problem
        return found

    return checked


def anything(value: _Result) -> _Result:
    """Whatever it is."""
    return value


def instance_of(kinds: type[Any] | tuple[type[Any], ...], wanted: str) -> Reader[Any]:
    """An instance."""
    return satisfying(anything, lambda value: isinstance(value, kinds), wanted)


string: Reader[str] = instance_of(str, "text")
boolean: Reader[bool] = instance_of(bool, "True or False")
none: Reader[None] = instance_of(type(None), "None")


def integer(low: int = 0) -> Reader[int]:
    """A whole number, of 64 bits at most."""
    return satisfying(
        anything, lambda value: is_integer(value) and value >= low, f"a whole number of at least {low}"
    )


def number(wanted: str = "a number", test: Callable[[float], bool] = lambda value: True) -> Reader[float]:
    """A number, also nan or inf unless the test leaves them out."""
    return satisfying(
        satisfying(anything, lambda value: isinstance(value, float) or is_integer(value), wanted), test, wanted
    )


fraction = number("a number in [0, 1]", lambda value: 0 <= value <= 1)


def dense_tensor(
    wanted: str = "a tensor", test: Callable[[Tensor], bool] = lambda value: True
) -> Reader[Tensor]:
    """A tensor that has its values in memory, one after the other."""
    return satisfying(
        anything,
        lambda value: (
            torch.is_tensor(value)
            and value.layout == torch.strided
            and not (value.is_meta or value.is_quantized)
            and test(value)
        ),
        wanted,
    )


def optional(reader: Reader[_Result]) -> Reader[_Result | None]:
    """What a reader reads, or ``None``."""
    return lambda value: None if value is None else reader(value)


def sequence(reader: Reader[_Result]) -> Reader[tuple[_Result, ...]]:
    """A list or tuple."""
    items = instance_of((list, tuple), "a list")
    return lambda value: tuple(within(f"[{place}]", reader, each) for place, each in enumerate(items(value)))


def fixed_list(*readers: Reader[Any]) -> Reader[tuple[Any, ...]]:
    """A list with one place for each reader."""
    cells = satisfying(
        sequence(anything), lambda value: len(value) == len(readers), f"a list of {len(readers)}"
    )
    return lambda value: tuple(
        within(f"[{place}]", reader, each)
        for place, (reader, each) in enumerate(zip(readers, cells(value), strict=True))
    )


def mapping(reader: Reader[_Result], key: Reader[Any] = string) -> Reader[dict[Any, _Result]]:
    """A dict of any entries."""
    entries = instance_of(Mapping, "a dict")
    return lambda value: {
        within("'s key", key, name): within(f"[{name!r}]", reader, each)
        for name, each in entries(value).items()
    }


def record(
    entries: Mapping[str, Reader[Any]], before: Mapping[str, Any] | None = None, *, others: bool = False
) -> Reader[dict[str, Any]]:
    """A dict of certain entries.

    Args:
        entries: Name to reader.
        before: What entries were, before there were any: earlier versions have not written them.
        others: Whether there may be further entries, which are left out.
    """
    absent = before or {}
    whole_dict = instance_of(Mapping, "a dict")

    def reader(value: object) -> dict[str, Any]:
        found = whole_dict(value)
        for name in found:
            if name not in entries and not others:
                raise SchemaError(f"has an entry {summary(name)}, expected {', '.join(entries)}")
        for name in entries:
            if name not in found and name not in absent:
                raise SchemaError(f"has no entry {name!r}")
        return {
            name: within(f".{name}", each, found[name] if name in found else absent[name])
            for name, each in entries.items()
        }

    return reader


def dataclass_of(cls: Callable[..., _Result], **entries: Reader[Any]) -> Reader[_Result]:
    """A dict of what a dataclass is made of; fields with a default may be missing."""
    known = fields(cls)  # type: ignore[arg-type]
    defaults = {each.name: each.default for each in known if each.default is not MISSING}
    defaults |= {each.name: each.default_factory() for each in known if each.default_factory is not MISSING}
    arguments = record(entries, defaults)
    return lambda value: cls(**arguments(value))
