"""Lines of users' code in which tensors are made, for reasons that name them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.channels.graph import movement_rules as movement
from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.rules import rule_for

_LIBRARIES = tuple(str(each) for each in (Path(torch.__file__).parent, Path(__file__).parents[2]))
# what such an op gives was made where its operand was
_MOVING = (movement.same, movement.move, movement.repeat, movement.reshape, movement.cut_out)


class Origins:
    """Keeps for tensors the line of code outside of PyTorch and this package that has made their values."""

    def __init__(self) -> None:
        self._lines: Any = WeakTensorKeyDictionary()

    def note(self, call: Call) -> None:
        """Record where the outputs of an op were made."""
        moved = self._lines.get(call.tensors[0]) if call.tensors and rule_for(call) in _MOVING else None
        line = moved or _line()
        self._lines.update((output, line) for output in call.outputs)

    def line(self, tensor: Tensor) -> str | None:
        """Return function, file and line in which the values of a tensor were made; ``None`` if not known."""
        found: str | None = self._lines.get(tensor)
        return found


def _line() -> str | None:
    """Return function, file and line of the innermost frame outside of libraries."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES):
            return f"{code.co_name}, {Path(code.co_filename).name}:{frame.f_lineno}"
    return None
