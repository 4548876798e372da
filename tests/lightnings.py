"""Lightning by the name that the environment variable LIGHTNING has: tests run under both.

LIGHTNING=pytorch_lightning python -m pytest
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

NAME = os.environ.get("LIGHTNING", "lightning.pytorch")
_PLACES = ("callbacks", "cli", "loggers", "plugins.precision", "strategies", "tuner")


def __getattr__(name: str) -> Any:
    """Return a class of the package, or of one of its modules."""
    for place in (NAME, *(f"{NAME}.{each}" for each in _PLACES)):
        if hasattr(import_module(place), name):
            return getattr(import_module(place), name)
    raise AttributeError(name)
