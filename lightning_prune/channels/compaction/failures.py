"""Messages of errors that a cut network raises, with the line of the user's code that would have to change."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[2])


def described(error: Exception) -> str:
    """Return the type and the first line of an error, and the innermost line of code outside libraries.

    These libraries are PyTorch and this package.
    """
    message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not any(map(Path(each.filename).is_relative_to, _LIBRARIES))]
    return f"{message} ({Path(own[-1].filename).name}:{own[-1].lineno}, in {own[-1].name})" if own else message
