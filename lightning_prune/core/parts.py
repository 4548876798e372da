"""The base class of criteria, structures, selectors and schedules, and checks of their arguments."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import Field
from typing import Any, TypeGuard

from lightning_prune.core.module_kinds import path_of

_LARGEST = 2**63 - 1
# of a field that parts of earlier versions lack: its default is not written, so that their states compare equal
LATER = {"later": True}


class Part:
    """Base class of criteria, structures, selectors, schedules, rewinds and guards: settings without state."""

    def __repr__(self) -> str:
        later = {name: each.default for name, each in _fields(self).items() if each.metadata == LATER}
        said = {name: value for name, value in vars(self).items() if name not in later or value != later[name]}
        arguments = ", ".join(f"{name}={_written(value)}" for name, value in said.items())
        return f"{type(self).__name__}({arguments})"


def _fields(part: Part) -> Mapping[str, Field[Any]]:
    return getattr(part, "__dataclass_fields__", {})


def _written(value: object) -> str:
    """Return a value as it is written in a call: classes, alone or in a tuple, by their full names."""
    if isinstance(value, tuple) and any(isinstance(each, type) for each in value):
        return f"({''.join(f'{_written(each)}, ' for each in value).rstrip()})"
    return path_of(value) if isinstance(value, type) else repr(value)


def describe(part: object) -> str:
    """Return the ``repr`` of a part without memory addresses, so that it can be compared between processes.

    >>> describe(Part())
    'Part()'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))


def check_part(value: object, base: type[Part], argument: str, optional: bool = False) -> None:
    """Check that ``value`` is an instance of ``base``, or ``None`` if ``optional``.

    Raises:
        ValueError: If it is not; the message names the argument and the available classes.
    """
    if isinstance(value, base) or (optional and value is None):
        return
    names = ", ".join(sorted(cls.__name__ for cls in concrete_subclasses(base) or {base}))
    raise ValueError(f"{argument}={value!r} is no {base.__name__}: give an instance of one of {names}.")


def check_counts(**arguments: int) -> None:
    """Check that each argument is an integer of at least 1.

    >>> check_counts(every=0)
    Traceback (most recent call last):
    ValueError: every=0 must be a whole number of at least 1.

    Raises:
        ValueError: If an argument is not; the message names it.
    """
    for name, number in arguments.items():
        if not is_integer(number) or number < 1:
            raise ValueError(f"{name}={number!r} must be a whole number of at least 1.")


def check_seconds(**arguments: float) -> None:
    """Check that each argument is a finite number of at least 0.

    >>> check_seconds(measure_seconds=-1)
    Traceback (most recent call last):
    ValueError: measure_seconds=-1 must be a finite number of seconds, at least 0.

    Raises:
        ValueError: If an argument is not; the message names it.
    """
    for name, number in arguments.items():
        if not is_number(number) or number < 0:
            raise ValueError(f"{name}={number!r} must be a finite number of seconds, at least 0.")


def check_seed(seed: int) -> None:
    """Check that a seed is an integer of at most 63 bits, which torch accepts.

    Raises:
        ValueError: If it is not.
    """
    if not is_integer(seed):
        raise ValueError(f"seed={seed!r} must be an integer of at most 63 bits.")


def check_flag(**arguments: bool) -> None:
    """Check that each argument is ``True`` or ``False``.

    Raises:
        ValueError: If an argument is not; the message names it.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False.")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an ``int`` (not a ``bool``) that fits an int64 tensor."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite ``float``, or an integer as in :func:`is_integer`."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def concrete_subclasses(base: type[Part]) -> set[type[Part]]:
    """Return all subclasses of ``base``, direct and indirect, that are not abstract.

    >>> from lightning_prune.schedules.base import Schedule
    >>> sorted(cls.__name__ for cls in concrete_subclasses(Schedule))[:3]
    ['Cubic', 'Exponential', 'Linear']
    """
    found: set[type[Part]] = set()
    for cls in base.__subclasses__():
        found |= concrete_subclasses(cls)
        if not inspect.isabstract(cls):
            found.add(cls)
    return found
