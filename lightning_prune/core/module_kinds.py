"""Kinds of modules, also of packages that may not be installed."""

from __future__ import annotations

from torch import nn

CONV1D = "transformers.pytorch_utils.Conv1D"  # a linear layer whose weight is stored inputs first


def is_a(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    """Return whether a module is of a class, or of a subclass of it.

    Args:
        module: The module.
        kind: The class, or its full name.
    """
    if isinstance(kind, str):
        return any(f"{each.__module__}.{each.__qualname__}" == kind for each in type(module).__mro__)
    return isinstance(module, kind)
