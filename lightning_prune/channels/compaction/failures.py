"""Failures of trials: errors of a cut network, with the line of the user's code that would have to change."""

from __future__ import annotations

import dis
import traceback
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[2])


class Failure(NamedTuple):
    """Why a trial has failed.

    Attributes:
        reason: The reason, in words.
        place: How far the pass came that raised an error: the instruction that each function of the user's
            code on the stack was at, and the number of ops called before; ``None`` if none did. That of a check
            in the user's code is like no other one.
    """

    reason: str
    place: tuple[object, ...] | None = None

    @classmethod
    def of(cls, error: Exception, ops: int) -> Failure:
        """Return the failure of a pass that raised an error.

        Args:
            error: The error.
            ops: The number of ops that were called before.
        """
        stack: list[object] = []
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if _is_own(code.co_filename):
                stack.append((code.co_filename, code.co_firstlineno, trace.tb_lasti))
            if trace.tb_next is None and _raises(code, trace.tb_lasti):
                # a check may read several numbers, and says the same until all of them fit
                stack.append(object())
            trace = trace.tb_next
        return cls(f"cannot be cut: {described(error)}", (*stack, ops))

    def inferred(self, other: str) -> Failure:
        """Return the failure of a group that is taken to be like another one, which has failed so."""
        return self._replace(reason=f"is like {other}, which {self.reason}")


class OpCounter(TorchDispatchMode):
    """Dispatch mode that counts ops, and lets modules take the ways that they take without it.

    Attributes:
        count: The number of ops that were called.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def _raises(code: CodeType, place: int) -> bool:
    """Return whether an instruction of code outside libraries is a ``raise`` or an ``assert``."""
    return _is_own(code.co_filename) and dis.opname[code.co_code[place]] == "RAISE_VARARGS"


def _is_own(file: str) -> bool:
    """Return whether a file is no part of PyTorch or this package."""
    return not any(map(Path(file).is_relative_to, _LIBRARIES))


def described(error: Exception) -> str:
    """Return the type and the first line of an error, the innermost line of code outside libraries, and module.

    These libraries are PyTorch and this package. The module is the innermost one that was running, by its name
    in the network.
    """
    message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if _is_own(each.filename)]
    line = [f"{Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name}"] if own else []
    places = [*line, *([f"module {name}"] if (name := _module_name(error)) else [])]
    return f"{message} ({', '.join(places)})" if places else message


def _module_name(error: Exception) -> str:
    """Return the name of the innermost module that ran, within the outermost one; "" if none did."""
    # a snapshot of the variables of the frame that has caught the error would keep the error alive
    raised = error.__traceback__ and error.__traceback__.tb_next
    with suppress(Exception):  # what a user's objects are may raise anything
        found = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(raised)]
        modules = [each for each in found if isinstance(each, nn.Module)]
        names = {id(each): name for name, each in modules[0].named_modules()} if modules else {}
        return next((names[id(each)] for each in reversed(modules) if id(each) in names), "")
    return ""
