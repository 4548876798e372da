"""Glob patterns over parameter and module names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase


def set_patterns(part: object, *names: str) -> None:
    """Makes arguments of a frozen dataclass tuples of patterns, however they were written; ``None`` stays.

    Raises:
        ValueError: If one is neither a pattern nor a list of them, nor ``None``.
    """
    for name in names:
        value = getattr(part, name)
        listed = (value,) if isinstance(value, str) else value
        if listed is None:
            continue
        if not isinstance(listed, Sequence) or not all(isinstance(pattern, str) for pattern in listed):
            raise ValueError(f"{name}={value!r} must be a pattern or a list of them.")
        object.__setattr__(part, name, tuple(listed))


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a pattern names the parameter, or a module that it lies in."""
    parts = name.split(".")
    path = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, pattern) for pattern in patterns or () for each in path)


def check_patterns(argument: str, patterns: Sequence[str] | None, names: set[str]) -> None:
    """Raises ValueError for a pattern that matches none of the names, and says which are nearest."""
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0)
            raise ValueError(
                f"{argument}={pattern!r} matches no parameter or module; the nearest names are"
                f" {', '.join(map(repr, nearest))}."
            )
