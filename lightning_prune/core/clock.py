"""The clocks of all measurements of time, which wait for an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch


def wall_time() -> float:
    """Return the time in seconds, once CUDA devices have computed all that they were given."""
    if torch.cuda.is_initialized():  # is_available() takes long
        torch.cuda.synchronize()
    return time.perf_counter()


def compute_time() -> float:
    """Return the time in seconds that computing takes, to compare networks by.

    Where PyTorch computes on one thread of a processor, it is the time that this thread has run: other programs
    on the machine change it little. Otherwise it is :func:`wall_time`.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized() and not _has_mps()
    return time.thread_time() if alone else wall_time()


def timed(call: Callable[[], object], clock: Callable[[], float] = wall_time) -> float:
    """Return how many seconds a call takes."""
    before = clock()
    call()
    return clock() - before


@cache
def _has_mps() -> bool:
    return torch.backends.mps.is_available()
