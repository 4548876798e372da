"""A progress bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

_Item = TypeVar("_Item")


def progress_bar(items: Iterable[_Item], what: str, show: bool, count: int | None = None) -> Iterator[_Item]:
    """The items, one after the other, with a bar that says how far that is.

    Args:
        items: What is gone through.
        what: Is being done.
        show: Whether to show the bar.
        count: How many items there are, where they do not know it.
    """
    yield from tqdm(items, what, count, disable=not show, leave=False)
