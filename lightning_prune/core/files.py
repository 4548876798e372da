"""Files: read whole or with a clear error, and written so that a half-written one is never seen."""

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


def read_file(path: str | PathLike[str], argument: str, *, sums: bool = False) -> Mapping[str, Any]:
    """What ``torch.save`` wrote, read with ``weights_only=True`` onto the CPU.

    Args:
        path: The file.
        argument: What the caller calls it, for the error.
        sums: Whether to look at the checksums that are in the file, too: torch does not.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it cannot be read, or holds something else than a mapping.
    """
    try:
        if sums:
            _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a file cut short fails in many ways
        raise ValueError(f"{argument}={os.fspath(path)!r} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument}={os.fspath(path)!r} holds a {type(content).__name__}, not a mapping.")
    return content


@contextmanager
def atomic_write(path: str | PathLike[str]) -> Iterator[Path]:
    """A place to write a file at, which takes its own place once all went well, and else is gone.

    Args:
        path: Where it belongs; its folder is made if it is missing.

    Yields:
        A path of the same name in a folder of its own; what else is written into that comes along.

    Raises:
        IsADirectoryError: If the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path={os.fspath(path)!r} is a folder: name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside it, since a move from another file system would be a copy, that can be seen half done
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        yield Path(folder, target.name)
        # the file itself last: it may refer to the others
        for written in sorted(Path(folder).iterdir(), key=lambda each: each.name == target.name):
            written.replace(target.parent / written.name)


def _check_sums(path: str | PathLike[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged!r} in it has another checksum.")
