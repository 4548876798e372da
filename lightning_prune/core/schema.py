"""Declarative schemas of saved states: readers that check a loaded value and say where it is wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_prune.core.parts import is_integer

_Result = TypeVar("_Result")
Reader: TypeAlias = Callable[[Any], _Result]  # returns the checked value, or raises SchemaError

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class SchemaError(Exception):
    """An entry of a state is not as its schema expects.

    Args:
        problem: Description of the error.

    Attributes:
        place: Path of the entry in the state, such as ``.masked['weight'].shape``. Each reader around the one
            that failed puts its own part of the path in front.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.place = ""

    def __str__(self) -> str:
        return f"{self.place.lstrip('.') or 'it'} {super().__str__()}"


def read(state: object, reader: Reader[_Result], what: str) -> _Result:
    """Check a state with a reader, and return what the reader gives.

    Args:
        state: The state; it is not changed.
        reader: The schema.
        what: Name of the state, for the error message.

    Raises:
        ValueError: If an entry is not as expected; the message gives its path, its value and what is expected.

    >>> read({"steps": "x"}, record({"steps": integer()}), "the state")
    Traceback (most recent call last):
    ValueError: the state: steps is 'x', expected a whole number of at least 0.
    """
    try:
        return reader(state)
    except SchemaError as error:
        raise ValueError(f"{what}: {error}.") from None


def read_at(place: str, reader: Reader[_Result], value: object) -> _Result:
    """Apply a reader to an entry of a larger value; errors get ``place``, the path of the entry, in front."""
    try:
        return reader(value)
    except SchemaError as error:
        error.place = place + error.place
        raise


def summary(value: object) -> str:
    """Return a short description of a value, for error messages."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return _repr.repr(value)


def satisfying(
    reader: Reader[_Result], test: Callable[[_Result], bool], wanted: str, place: str = ""
) -> Reader[_Result]:
    """Return a reader that also tests what another reader gives.

    Args:
        reader: The other reader.
        test: Returns whether a value is valid.
        wanted: What is expected, for the error message.
        place: Path, within the value, of the entry that the test is about; empty for the value itself.
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
    """Accept any value: a reader that checks nothing."""
    return value


def instance_of(kinds: type[Any] | tuple[type[Any], ...], wanted: str) -> Reader[Any]:
    """Return a reader for instances of a class, or of one of several."""
    return satisfying(anything, lambda value: isinstance(value, kinds), wanted)


string: Reader[str] = instance_of(str, "text")
boolean: Reader[bool] = instance_of(bool, "True or False")
none: Reader[None] = instance_of(type(None), "None")


def integer(low: int = 0) -> Reader[int]:
    """Return a reader for integers from ``low`` on that fit 64 bits."""
    return satisfying(
        anything, lambda value: is_integer(value) and value >= low, f"a whole number of at least {low}"
    )


def number(wanted: str = "a number", test: Callable[[float], bool] = lambda value: True) -> Reader[float]:
    """Return a reader for numbers that pass a test; nan and inf are numbers, too."""
    return satisfying(
        anything, lambda value: (isinstance(value, float) or is_integer(value)) and test(value), wanted
    )


fraction = number("a number in [0, 1]", lambda value: 0 <= value <= 1)


def dense_tensor(
    wanted: str = "a tensor", test: Callable[[Tensor], bool] = lambda value: True
) -> Reader[Tensor]:
    """Return a reader for tensors that pass a test, and are not sparse, quantized or on the meta device."""
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
    """Return a reader that also accepts ``None``."""
    return lambda value: None if value is None else reader(value)


def unchanged(reader: Reader[Any]) -> Reader[Any]:
    """Return a reader that gives a value as it is, once another reader has checked it."""

    def checked(value: object) -> object:
        reader(value)
        return value

    return checked


def sequence(reader: Reader[_Result]) -> Reader[tuple[_Result, ...]]:
    """Return a reader for lists and tuples of any length, which gives a tuple."""
    items = instance_of((list, tuple), "a list")
    return lambda value: tuple(read_at(f"[{place}]", reader, each) for place, each in enumerate(items(value)))


def fixed_list(*readers: Reader[Any]) -> Reader[tuple[Any, ...]]:
    """Return a reader for lists that have one item for each of the given readers."""
    cells = satisfying(
        sequence(anything), lambda value: len(value) == len(readers), f"a list of {len(readers)}"
    )
    return lambda value: tuple(
        read_at(f"[{place}]", reader, each)
        for place, (reader, each) in enumerate(zip(readers, cells(value), strict=True))
    )


def mapping(reader: Reader[_Result], key: Reader[Any] = string) -> Reader[dict[Any, _Result]]:
    """Return a reader for dicts whose values, and whose keys, are alike."""
    entries = instance_of(Mapping, "a dict")
    return lambda value: {
        read_at("'s key", key, name): read_at(f"[{name!r}]", reader, each)
        for name, each in entries(value).items()
    }


def record(
    entries: Mapping[str, Reader[Any]], before: Mapping[str, Any] | None = None, *, others: bool = False
) -> Reader[dict[str, Any]]:
    """Return a reader for dicts with given keys.

    Args:
        entries: Maps each key to the reader of its value.
        before: Maps keys that may be missing, because earlier versions did not write them, to their values.
        others: Whether further keys are allowed; the result leaves them out.
    """
    absent = before or {}
    whole_dict = instance_of(Mapping, "a dict")

    def reader(value: object) -> dict[str, Any]:
        found = whole_dict(value)
        for name in found:
            if name not in entries and not others:
                raise SchemaError(f"has an entry {summary(name)}, expected {', '.join(entries)}")
        complete = {**absent, **found}
        for name in entries:
            if name not in complete:
                raise SchemaError(f"has no entry {name!r}")
        return {name: read_at(f".{name}", each, complete[name]) for name, each in entries.items()}

    return reader


def read_versioned(state: Any, reader: Reader[_Result], version: int, what: str) -> _Result:
    """Return a saved state, read by a schema.

    Args:
        state: A mapping with an entry ``"version"``.
        reader: Reads it.
        version: The version that the schema reads.
        what: Names the state in error messages.

    Raises:
        ValueError: If it has no version or another one, or is not what the schema reads.
    """
    found = read(state, record({"version": anything}, before={"version": None}, others=True), what)["version"]
    if found is None:
        raise ValueError(f"{what} is none that lightning_prune has written: it has no version.")
    if type(found) is not int or found != version:
        raise ValueError(
            f"{what} has version {summary(found)}, this lightning_prune reads {version}: install the version"
            " that wrote it."
        )
    return read(state, reader, what)


def dataclass_of(cls: Callable[..., _Result], **entries: Reader[Any]) -> Reader[_Result]:
    """Return a reader that makes a dataclass from a dict of fields; those with a default may be missing."""
    known = fields(cls)  # type: ignore[arg-type]
    defaults = {each.name: each.default for each in known if each.default is not MISSING}
    defaults |= {each.name: each.default_factory() for each in known if each.default_factory is not MISSING}
    arguments = record(entries, defaults)
    return lambda value: cls(**arguments(value))
