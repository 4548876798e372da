"""What the first of several processes computes, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist

_Result = TypeVar("_Result")


def of_first_process(compute: Callable[[], _Result]) -> _Result:
    """Return what the first process computes, in all processes; all must call this if there are several.

    An error in the first process is raised in all.

    Args:
        compute: Returns a value that can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return compute()
    sent: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            sent[0] = compute()
        except Exception as error:  # the others would wait for ever
            sent[1] = error
    dist.broadcast_object_list(sent, src=0)
    result, failure = sent
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]
