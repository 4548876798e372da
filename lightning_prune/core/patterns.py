"""Glob patterns over parameter and module names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase


def set_patterns(part: object, *names: str) -> None:
    """Replace arguments of a frozen dataclass, each a pattern or a list of them, by tuples; ``None`` stays.

    Raises:
        ValueError: If an argument is neither a pattern nor a list of them, nor ``None``.
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
    """Return whether any pattern matches the name of a parameter, or that of a module that contains it."""
    parts = name.split(".")
    path = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, pattern) for pattern in patterns or () for each in path)


def check_patterns(argument: str, patterns: Sequence[str] | None, names: set[str]) -> None:
    """Raise ValueError if a pattern matches none of the names; the message gives the nearest ones."""
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = ", ".join(map(repr, difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0)))
            known = f"the nearest names are {nearest}" if nearest else "the model has no named parts"
            raise ValueError(f"{argument}={pattern!r} matches no parameter or module; {known}.")
