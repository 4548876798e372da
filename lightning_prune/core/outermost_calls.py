"""Calls of modules with parameters that no other module makes: of a network, or in a step of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn


@dataclass
class OutermostCalls:
    """What was called, in order.

    Attributes:
        names: Names of the modules.
        outputs: What they have returned; ``None`` for one that has failed.
    """

    names: list[str] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


@contextmanager
def outermost_calls(model: nn.Module) -> Iterator[OutermostCalls]:
    """Record, in a ``with`` block, the calls of modules with parameters outside of calls of other ones."""
    calls, inside = OutermostCalls(), list[str]()

    def enter(name: str, *_: Any) -> None:
        if not inside:
            calls.names.append(name)
        inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()
        if not inside:
            calls.outputs.append(output)

    handles = []
    for name, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            handles.append(module.register_forward_pre_hook(partial(enter, name), prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
