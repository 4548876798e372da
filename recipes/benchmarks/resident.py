"""Measures the resident memory of a process on Linux, and runs functions in new processes to do so."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def give_back_freed() -> None:
    """Let glibc return freed blocks of 64 KiB or more to the system at once, instead of keeping them."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def apart(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return the result of a function that runs in a new process.

    Raises:
        BrokenProcessPool: If that process is killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return _status("VmRSS")


def peak() -> int:
    """Return the peak of the resident memory in bytes since :func:`forget_peak`, or since the process began."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Reset the peak to the present resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
