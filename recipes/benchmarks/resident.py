"""Resident memory of a process, on Linux, and processes to measure it in."""

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
    """From now on what is freed is given back at once, but for small pieces: glibc keeps it otherwise."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def apart(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What a function gives in a process of its own; an error where that process is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def resident() -> int:
    """Bytes now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes since :func:`forget_peak`, or since the process began."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
