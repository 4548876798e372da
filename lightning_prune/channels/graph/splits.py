"""Which dimension may shrink where an op makes several of one, and what sizes follow from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_KINDS = (2, 3)  # sizes of a dimension that holds keys and values, or queries, keys and values


@dataclass(frozen=True)
class Split:
    """A choice of what may shrink where a labelled dimension becomes several.

    Args:
        choose: Given the sizes of the dimensions that one becomes, as in a view, returns the number of the one
            whose indices are units.
        heads: Whether heads of attention alone are looked for.
        zeros_follow: Whether zeros and the like that are joined with as many channels take their number from
            these; otherwise it is a number of its own.
    """

    choose: Callable[[Sequence[int]], int]
    heads: bool = False
    zeros_follow: bool = False


def _head_dim(sizes: Sequence[int]) -> int:
    return int(len(sizes) > 2 and sizes[0] in _KINDS)


# channels within heads or groups: the last dimension
LAST_DIM = Split(lambda sizes: len(sizes) - 1)
# the same, with zeros whose number is that of the channels that they are joined with
ZEROS_FOLLOW = Split(LAST_DIM.choose, zeros_follow=True)
# whole groups: the first dimension
FIRST_DIM = Split(lambda sizes: 0)
# heads: the first dimension, or the second of at least three if the first separates queries, keys and values
HEAD_DIM = Split(_head_dim, heads=True)
# heads, or what contains them, where a first reshape separates queries, keys and values, and a second one heads
SPLIT_HEAD_DIM = Split(lambda sizes: int(sizes[0] in _KINDS), heads=True)
