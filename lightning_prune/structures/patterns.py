"""Glob patterns over parameter and module names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase


def check_are_patterns(**arguments: object) -> None:
    """Raises ValueError for an argument that is neither a pattern nor a list of them, nor ``None``."""
    for name, value in arguments.items():
        listed = value is None or isinstance(value, Sequence)
        if not listed or not all(isinstance(pattern, str) for pattern in as_patterns(value)):  # type: ignore[arg-type]
            raise ValueError(f"{name}={value!r} must be a pattern or a list of them.")


def as_patterns(patterns: str | Sequence[str] | None) -> list[str]:
    """One pattern, several or none, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def matches(name: str, patterns: str | Sequence[str] | None) -> bool:
    """Whether a pattern names the parameter, or a module that it lies in."""
    parts = name.split(".")
    path = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, pattern) for pattern in as_patterns(patterns) for each in path)


def check_patterns(argument: str, patterns: str | Sequence[str] | None, names: set[str]) -> None:
    """Raises ValueError for a pattern that matches none of the names, and says which are nearest."""
    for pattern in as_patterns(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0)
            raise ValueError(
                f"{argument}={pattern!r} matches no parameter or module; the nearest names are"
                f" {', '.join(map(repr, nearest))}."
            )
