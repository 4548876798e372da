"""Whole numbers that modules keep in attributes, or in lists and tuples there, such as ``sizes[1]``."""

from __future__ import annotations

from typing import Any

from torch import nn


def whole_numbers(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers that a module keeps, by name.

    >>> module = nn.Module()
    >>> module.width, module.sizes = 8, (6, 2)
    >>> whole_numbers(module)
    {'width': 8, 'sizes[0]': 6, 'sizes[1]': 2}
    """
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        listed = type(value) in (list, tuple)
        items = [(f"{name}[{place}]", each) for place, each in enumerate(value)] if listed else [(name, value)]
        found |= {key: each for key, each in items if type(each) is int}
    return found


def get_number(module: nn.Module, key: str) -> Any:
    """Return an attribute, or an item of one, by name; ``None`` if there is none."""
    return getattr(module, key, None) if attribute_of(key) == key else whole_numbers(module).get(key)


def set_number_(module: nn.Module, key: str, number: Any) -> None:
    """Set an attribute, or an item of one, by name; other modules may share a list, which is copied."""
    name, _, place = key.rstrip("]").partition("[")
    if place:
        values = getattr(module, name)
        number = type(values)(number if each == int(place) else value for each, value in enumerate(values))
    setattr(module, name, number)


def attribute_of(key: str) -> str:
    """Return the name of the attribute that a number is in."""
    return key.partition("[")[0]
