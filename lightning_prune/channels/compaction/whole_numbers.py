"""Whole numbers that modules keep: attributes, items of lists and tuples there, settings of a configuration."""

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


def settings(module: nn.Module) -> dict[str, int]:
    """Return the whole numbers in objects of plain values that a module refers to, such as a configuration.

    >>> from types import SimpleNamespace
    >>> module = nn.Module()
    >>> module.config = SimpleNamespace(heads=4, name="small")
    >>> settings(module)
    {'config.heads': 4}
    """
    return {
        f"{name}.{key}": number
        for name, value in vars(module).items()
        for key, number in _plain_values(value).items()
        if type(number) is int
    }


def _plain_values(value: Any) -> Mapping[str, Any]:
    """Return the attributes of an object if all of them are plain values, and none otherwise."""
    found: Mapping[str, Any] = getattr(value, "__dict__", {})
    return found if all(isinstance(each, _PLAIN) for each in found.values()) else {}


def get_number(module: nn.Module, key: str) -> Any:
    """Return an attribute, an item of one, or a setting, by name; ``None`` if there is none."""
    if key.isidentifier():
        return getattr(module, key, None)
    return (settings(module) if "." in key else whole_numbers(module)).get(key)


def set_number_(module: nn.Module, key: str, number: Any) -> None:
    """Set an attribute, an item of one, or a setting, by name.

    Other modules may share a list or a configuration: the module gets a copy of its own.
    """
    name, _, setting = key.partition(".")
    if setting:
        own = copy.copy(getattr(module, name))
        vars(own)[setting] = number  # past a __setattr__ that would change other settings, or refuse
        number = own
    name, _, place = name.rstrip("]").partition("[")
    if place:
        values = getattr(module, name)
        number = type(values)(number if each == int(place) else value for each, value in enumerate(values))
    setattr(module, name, number)
