"""A message about work that takes long before a step is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from lightning_prune.training.lightning_packages import rank_zero_info

SECONDS = 5.0  # of work before the message


@contextmanager
def slow_work(what: str) -> Iterator[None]:
    """Say what goes on, once, if a ``with`` block is not through after five seconds.

    Args:
        what: What the block does, as the start of a sentence.
    """
    timer = Timer(SECONDS, rank_zero_info, [f"{what} takes more than {SECONDS:g} seconds."])
    timer.daemon = True  # an interpreter that ends does not wait for it
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
