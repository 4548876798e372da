"""Progress bars on terminals, and a switch for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias, TypeVar

from tqdm.auto import tqdm

_Item = TypeVar("_Item")
_Counter: TypeAlias = "tqdm[None]"

DELAY = 1.0  # seconds of work before a counter of passes is shown

_allowed: ContextVar[bool] = ContextVar("progress bars are allowed", default=True)
_counter: ContextVar[_Counter | None] = ContextVar("the counter of passes", default=None)


@contextmanager
def allow_progress_bars(allowed: bool) -> Iterator[None]:
    """Show progress bars within a ``with`` block or show none.

    Args:
        allowed: Whether to show them. A block within one that shows none shows none.
    """
    token = _allowed.set(allowed and _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(token)


def progress_bar(
    items: Iterable[_Item], what: str, show: bool = True, count: int | None = None
) -> Iterator[_Item]:
    """Yield the items, with a progress bar if standard error is a terminal.

    Args:
        items: The items.
        what: Text beside the bar: what the loop does.
        show: Whether to show the bar, where bars are allowed.
        count: Number of items, if ``items`` has no length.
    """
    yield from tqdm(items, what, count, disable=_disabled(show), leave=False)


@contextmanager
def pass_counter(what: str) -> Iterator[None]:
    """Show how many passes :func:`count_pass` counts within a ``with`` block, if it takes a second or more.

    Nobody knows before how many there will be. A block within another one adds to the counter of that.

    Args:
        what: Text beside the counter: what the passes are for.
    """
    if _counter.get() is not None:
        yield
        return
    form = "{desc}: {n_fmt} passes [{elapsed}]"
    with tqdm(desc=what, bar_format=form, delay=DELAY, disable=_disabled(), leave=False) as counter:
        token = _counter.set(counter)
        try:
            yield
        finally:
            _counter.reset(token)


def count_pass() -> None:
    """Count a pass of a network, if there is a counter."""
    if (counter := _counter.get()) is not None:
        counter.update()


def _disabled(show: bool = True) -> bool | None:
    """Return what tqdm takes: True for no bar, None for one where it writes to a terminal."""
    return None if show and _allowed.get() else True
