"""Glob patterns over parameter and module names, and kinds of modules in their place."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar, cast

from torch import nn

from lightning_prune.core.module_kinds import loaded_class, path_of

Pattern: TypeAlias = str | type[nn.Module]  # over names, or a kind of modules: a class or its dotted path
Patterns: TypeAlias = Pattern | Sequence[Pattern] | None
_Part = TypeVar("_Part")


def set_patterns(part: object, *names: str) -> None:
    """Replace arguments of a frozen dataclass, each a pattern or a list of them, by tuples; ``None`` stays.

    Raises:
        ValueError: If an argument is neither a pattern nor a list of them, nor ``None``.
    """
    for name in names:
        value = getattr(part, name)
        listed = (value,) if isinstance(value, str | type) else value
        if listed is None:
            continue
        if not isinstance(listed, Sequence) or not all(map(_is_pattern, listed)):
            raise ValueError(
                f"{name}={value!r} must be a pattern or a list of them: text, or classes of modules."
            )
        object.__setattr__(part, name, tuple(listed))


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, type) and issubclass(value, nn.Module))


def names_of_kinds(argument: str, patterns: Patterns, model: nn.Module) -> tuple[str, ...] | None:
    """Return patterns of names alone: kinds of modules are replaced by the names of their modules in a model.

    A string is a kind if it is the dotted path of a class of modules that is loaded, such as
    ``torch.nn.Conv2d``; nothing is imported to find out. Modules of subclasses are of the kind, too.

    Raises:
        ValueError: If the model has no module of a kind; the message gives those that it has.
    """
    if patterns is None:
        return None
    modules = list(model.named_modules())
    found: list[str] = []
    for pattern in cast(Sequence[Pattern], patterns):
        kind = loaded_class(pattern) if isinstance(pattern, str) else pattern
        if kind is None:
            found.append(str(pattern))
            continue
        # the model itself has no name
        names = [glob.escape(name) if name else "*" for name, module in modules if isinstance(module, kind)]
        if not names:
            there = ", ".join(sorted({path_of(type(module)) for _, module in modules}))
            raise ValueError(f"{argument}={path_of(kind)} is the kind of no module; there are {there}.")
        found += names
    return tuple(found)


def with_names(part: _Part, model: nn.Module) -> _Part:
    """Return a dataclass with the names of modules in place of kinds in ``include`` and ``exclude``."""
    named = {each: names_of_kinds(each, getattr(part, each), model) for each in ("include", "exclude")}
    return replace(part, **named)  # type: ignore[type-var]


def _listed(patterns: Patterns) -> Sequence[str]:
    return cast(Sequence[str], patterns or ())


def matches(name: str, patterns: Patterns) -> bool:
    """Return whether any pattern of names matches that of a parameter, or of a module that contains it."""
    parts = name.split(".")
    path = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, pattern) for pattern in _listed(patterns) for each in path)


def check_patterns(argument: str, patterns: Patterns, names: set[str]) -> None:
    """Raise ValueError if a pattern of names matches none of the names; the message gives the nearest ones."""
    for pattern in _listed(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = ", ".join(map(repr, difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0)))
            known = f"the nearest names are {nearest}" if nearest else "the model has no named parts"
            raise ValueError(f"{argument}={pattern!r} matches no parameter or module; {known}.")
