"""Messages of errors that a cut network raises, with the line of the user's code that would have to change."""

from __future__ import annotations

import traceback
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[2])


def described(error: Exception) -> str:
    """Return the type and the first line of an error, the innermost line of code outside libraries, and module.

    These libraries are PyTorch and this package. The module is the innermost one that was running, by its name
    in the network.
    """
    message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not any(map(Path(each.filename).is_relative_to, _LIBRARIES))]
    line = [f"{Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name}"] if own else []
    places = [*line, *([f"module {name}"] if (name := _module_name(error)) else [])]
    return f"{message} ({', '.join(places)})" if places else message


def place_of(failure: str) -> str:
    """Return the line and the module that :func:`described` has ended a text with."""
    return failure.rpartition(" (")[2]


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
