"""The content of packed files in the format of safetensors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PARTS = ("bits", "values")  # tensors of a masked parameter
_KEY = "lightning_prune"  # of the metadata: all that is no tensor, as JSON


def write_safetensors(content: Mapping[str, Any], path: Path, who: str) -> None:
    """Write the content of a packed file.

    Tensors have the names that they have in ``state_dict``, by which other readers find them; a masked
    parameter is two of them, ``NAME.bits`` and ``NAME.values``. The rest is JSON in the metadata, beside a
    checksum.

    Args:
        content: The content, as ``save_packed`` makes it.
        path: The file.
        who: Name of the model's class, for error messages.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If ``state_dict`` holds what is neither a tensor nor a plain value of JSON.
    """
    save_file = _package().save_file
    masked = content["masked"]
    entries = {
        **content["dense"],
        **{f"{name}.{part}": entry[part] for name, entry in masked.items() for part in _PARTS},
    }
    named: dict[int, str] = {}  # the first name of each tensor: a file has a tensor once
    for name, value in entries.items():
        if torch.is_tensor(value):
            named.setdefault(id(value), name)
    rest = {
        "format": content["format"],
        "plans": content["plans"],
        "shapes": {name: entry["shape"] for name, entry in masked.items()},
        "tied": {name: named[id(value)] for name, value in entries.items() if id(value) in named},
        "plain": {name: value for name, value in entries.items() if id(value) not in named},
    }
    tensors = {name: entries[name].detach().cpu().contiguous() for name in named.values()}
    try:
        text = json.dumps(rest)
        if json.loads(text) != rest:  # such as tuples, which would come back as lists
            raise TypeError("JSON would give it back otherwise")
    except TypeError as error:
        raise ValueError(
            f"{who}.state_dict() holds what a safetensors file cannot: {error}. Return plain values from"
            " get_extra_state, or choose another suffix."
        ) from error
    save_file(tensors, path, {"format": "pt", _KEY: text, "crc32": _sum(text, tensors)})


def read_safetensors(path: str | PathLike[str], argument: str) -> Mapping[str, Any]:
    """Return the content that :func:`write_safetensors` wrote.

    Args:
        path: The file.
        argument: Name of the caller's argument that holds the path, for error messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
        ValueError: If the file cannot be read, or is not of ``save_packed``.
    """
    package = _package()
    try:
        with package.safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise
    except Exception as error:  # a truncated file may raise anything
        raise ValueError(f"{argument}={os.fspath(path)!r} cannot be read: {error}") from error
    text = metadata.get(_KEY)
    if text is None:
        return {}
    if metadata.get("crc32") != _sum(text, tensors):
        raise ValueError(f"{argument}={os.fspath(path)!r} cannot be read: it has another checksum.")
    rest = json.loads(text)
    entries = {**rest["plain"], **{name: tensors[first] for name, first in rest["tied"].items()}}
    masked = {
        name: {"shape": shape, **{part: entries.pop(f"{name}.{part}") for part in _PARTS}}
        for name, shape in rest["shapes"].items()
    }
    return {"format": rest["format"], "plans": rest["plans"], "masked": masked, "dense": entries}


def _package() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("This needs safetensors: pip install 'lightning_prune[safetensors]'.") from error
    return safetensors.torch


def _sum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of all that a file holds."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].view(-1).view(torch.uint8).numpy().tobytes(), found)
    return str(found)
