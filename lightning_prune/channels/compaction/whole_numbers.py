"""Whole numbers that modules keep: attributes, items of lists and tuples there, and in configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (int, float, str, list, tuple, dict, set, type(None), torch.dtype, torch.device)


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


def configured_numbers(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers in objects of plain values that a module refers to, such as a configuration.

    >>> from types import SimpleNamespace
    >>> module = nn.Module()
    >>> module.config = SimpleNamespace(heads=4, name="small")
    >>> configured_numbers(module)
    {'config.heads': 4}
    """
    return {
        f"{name}.{key}": number
        for name, value in vars(module).items()
        for key, number in _plain_values(value).items()
        if type(number) is int
    }


def _plain_values(value: Any) -> Mapping[str, Any]:
    """Return the attributes of an object that has plain values alone and can be copied, and none of others."""
    if callable(value):
        return {}
    try:
        found = vars(value)
        plain = all(isinstance(each, _PLAIN) for each in found.values())
        return found if plain and copy.copy(value) is not value else {}
    except Exception:  # an object may raise anything where it is looked at, and most have no attributes
        return {}


def get_number(module: nn.Module, key: str) -> Any:
    """Return an attribute, an item of one, or a number in a configuration; ``None`` if there is none."""
    name, _, inner = key.partition(".")
    if inner and key not in vars(module):
        return getattr(getattr(module, name, None), "__dict__", {}).get(inner)
    return whole_numbers(module).get(key) if "[" in key else getattr(module, key, None)


def set_number_(module: nn.Module, key: str, number: Any) -> None:
    """Set an attribute, an item of one, or a number in a configuration.

    Other modules may share a list or a configuration: the module gets a copy of its own.
    """
    name, _, inner = key.partition(".")
    if inner and key not in vars(module):
        own = copy.copy(getattr(module, name))
        vars(own)[inner] = number  # past a __setattr__ that would change other values, or refuse
        setattr(module, name, own)
        return
    name, _, place = key.rstrip("]").partition("[")
    if place:
        values = getattr(module, name)
        number = type(values)(number if each == int(place) else value for each, value in enumerate(values))
    setattr(module, name, number)
