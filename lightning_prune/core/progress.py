"""A progress bar for long loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

_Item = TypeVar("_Item")


def progress_bar(items: Iterable[_Item], what: str, show: bool, count: int | None = None) -> Iterator[_Item]:
    """Yield the items, with a progress bar.

    Args:
        items: The items.
        what: Text beside the bar: what the loop does.
        show: Whether to show the bar.
        count: Number of items, if ``items`` has no length.
    """
    yield from tqdm(items, what, count, disable=not show, leave=False)
