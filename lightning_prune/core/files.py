"""Reading of files that ``torch.save`` wrote, with clear errors, and atomic writing of files."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

_OBJECTS = (
    ", since it holds objects besides tensors and plain values, in hyperparameters as a rule. If you trust the"
    " file, name their classes in torch.serialization.add_safe_globals([...]); load_compact also takes what"
    " torch.load(path, weights_only=False) returns. torch says"
)


def read_file(path: str | PathLike[str], argument: str, *, sums: bool = False) -> Mapping[str, Any]:
    """Return the content of a file that ``torch.save`` wrote, loaded with ``weights_only=True`` onto the CPU.

    Args:
        path: The file.
        argument: Name of the caller's argument that holds the path, for error messages.
        sums: Whether to verify the checksums in the file first, which ``torch.load`` does not do.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or its content is not a mapping.
    """
    try:
        if sums:
            _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a truncated file may raise anything
        hint = _OBJECTS if "Unsupported global" in str(error) else ""
        raise ValueError(f"{argument}={os.fspath(path)!r} cannot be read{hint}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument}={os.fspath(path)!r} holds a {type(content).__name__}, not a mapping.")
    return content


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write a file to, and move the file to ``path`` at the end of the block.

    After an error in the block the written files are deleted, and a file that was at ``path`` is unchanged.

    Args:
        path: The final path; missing parent folders are created.

    Yields:
        A path with the same file name in a new temporary folder. Other files that are written into that folder
        are moved along with it.

    Raises:
        IsADirectoryError: If ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path={os.fspath(path)!r} is a folder: name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the folder of the target: a move from another file system would be a copy, which is not atomic
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        yield Path(folder, target.name)
        # the file itself is moved last, because it may refer to the others
        for written in sorted(Path(folder).iterdir(), key=lambda each: each.name == target.name):
            written.replace(target.parent / written.name)


def _check_sums(path: str | PathLike[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} in it has another checksum.")
