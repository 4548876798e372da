"""Measures the resident memory of a process on Linux, and runs functions in new processes to do so."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_T = TypeVar("_T")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def give_back_freed() -> None:
    """Let glibc return freed blocks of 64 KiB or more to the system at once, instead of keeping them."""
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


class Limits(NamedTuple):
    """What a process may take.

    Attributes:
        seconds: Processor time.
        gibibytes: Memory of its own.
    """

    seconds: int
    gibibytes: int

    def set(self) -> None:
        """Let the system end this process when its time is over, and refuse it more memory."""
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_DATA, (self.gibibytes * 2**30, resource.RLIM_INFINITY))


def apart(
    function: Callable[..., _T], /, *args: Any, limits: Limits | None = None, preload: Sequence[str] = ()
) -> _T:
    """Return the result of a function that runs in a new process.

    Args:
        function: The function.
        args: Its arguments.
        limits: What the process may take; ``None`` for no limits.
        preload: Modules that are imported once for all processes.

    Raises:
        BrokenProcessPool: If that process is killed, as at a limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, context, limits and limits.set) as pool:
        return pool.submit(function, *args).result()


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
