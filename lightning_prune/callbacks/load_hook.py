"""A hook around a LightningModule's ``on_load_checkpoint``, which runs before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

_NAME = "on_load_checkpoint"
_Around = Callable[[Mapping[str, Any]], AbstractContextManager[None]]


class LoadHook:
    """Wraps a module's own ``on_load_checkpoint`` in a ``with`` block, until it is released.

    Lightning loads the weights of a module before the state of a callback, so a callback that changes the
    shapes of parameters must do so here.

    Args:
        module: The LightningModule.
        around: Takes the checkpoint and returns the context manager in which the module's own hook runs.
    """

    def __init__(self, module: nn.Module, around: _Around) -> None:
        self._module = module
        self._around = around
        self._hides = vars(module).get(_NAME)
        self._own = getattr(module, _NAME)
        vars(module)[_NAME] = self

    def __call__(self, checkpoint: Mapping[str, Any]) -> None:
        """Run the module's own hook within the context manager."""
        with self._around(checkpoint):
            self._own(checkpoint)

    def __deepcopy__(self, memo: Any) -> LoadHook:
        return self  # a Trainer never loads a checkpoint into a copy of the module

    def release(self) -> None:
        """Remove the hook, even if another one wraps it."""
        above = vars(self._module).get(_NAME)
        if above is self and self._hides is None:
            del vars(self._module)[_NAME]
        elif above is self:
            vars(self._module)[_NAME] = self._hides
        while isinstance(above, LoadHook):
            if above._hides is self:
                above._hides, above._own = self._hides, self._own
            above = above._hides
