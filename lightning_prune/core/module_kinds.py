"""Kinds of modules, also of packages that may not be installed."""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

from torch import nn

CONV1D = "transformers.pytorch_utils.Conv1D"  # a linear layer whose weight is stored inputs first


def is_a(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    """Return whether a module is of a class, or of a subclass of it.

    Args:
        module: The module.
        kind: The class, or its full name.
    """
    if isinstance(kind, str):
        return any(path_of(each) == kind for each in type(module).__mro__)
    return isinstance(module, kind)


def path_of(kind: type) -> str:
    """Return the full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def loaded_class(path: str) -> type[nn.Module] | None:
    """Return the class of modules with a dotted path, if it is loaded; ``None`` otherwise.

    >>> loaded_class("torch.nn.Conv2d"), loaded_class("torch.nn.functional.conv2d"), loaded_class("net.0")
    (<class 'torch.nn.modules.conv.Conv2d'>, None, None)
    """
    names = path.split(".")
    for length in range(len(names) - 1, 0, -1):
        place = sys.modules.get(".".join(names[:length]))
        if place is not None:
            try:
                found: Any = reduce(getattr, names[length:], place)
            except Exception:  # a package may compute its attributes
                return None
            return found if isinstance(found, type) and issubclass(found, nn.Module) else None
    return None
