"""The k-th smallest of any number of scores, exactly: no sort, and no tensor that holds them all.

A histogram of the scores' leading 16 bits says in which of 65,536 bins the k-th lies, a histogram of the
next 16 bits within that bin narrows it down, until no bits are left. Each pass reads the scores once and
adds counts, so scores may come in pieces, and lie in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.units.shards import Shards, Unsharded

_BINS = 1 << 16
_MARGIN = 0.003  # of the rank; scores between make up twice that share, to be kept for a moment
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Boundary:
    """Where the ``count`` smallest scores end.

    Args:
        value: The ``count``-th smallest score.
        below: How many scores are smaller than it.
        ties: How many are equal to it.
    """

    value: float
    below: int
    ties: int


def find_boundary(pieces: Callable[[], Iterable[Tensor]], count: int, shards: Shards = Unsharded()) -> Boundary:
    """Finds the ``count``-th smallest score.

    Args:
        pieces: Gives the scores, of any shape, float32 or float64 (one of them throughout), the same at
            every call. No nan.
        count: From 1 to the number of scores.
        shards: Who has the other scores.

    Returns:
        The boundary; exact, ties counted.

    >>> scores = [torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 2.0]])]
    >>> boundary(lambda: scores, 2)
    Boundary(value=2.0, below=1, ties=2)
    """
    prefix, seen, below = 0, 0, 0
    while True:
        here, dtype = _histogram(pieces(), prefix, seen)
        histogram = shards.add_up(here)
        # Negative floats fall as their bits rise.
        ascending = seen > 0 and prefix >= 0
        bins = torch.arange(_BINS, device=histogram.device)
        order = bins if ascending else bins.flip(0)
        if seen == 0:
            order = torch.cat([order[: _BINS // 2], bins[: _BINS // 2]])
        cumulative = histogram[order].cumsum(0)
        place = int(torch.searchsorted(cumulative, count - below))
        found, ties = int(order[place]), int(histogram[order[place]])
        below += int(cumulative[place]) - ties
        prefix = (prefix << 16 | found) if seen else found - (found >= _BINS // 2) * _BINS
        seen += 16
        if seen == torch.finfo(dtype).bits:
            value = float(torch.tensor(prefix, dtype=_INTEGER[dtype]).view(dtype))
            return Boundary(value, below, ties) if value else _boundary_at_zero(pieces(), shards)


def _histogram(pieces: Iterable[Tensor], prefix: int, seen: int) -> tuple[Tensor, torch.dtype]:
    """Counts 16 bits of the scores whose leading ``seen`` bits, read as an integer, are ``prefix``."""
    total: Tensor | None = None
    for piece in pieces:
        bits = torch.finfo(piece.dtype).bits - seen
        keys = piece.view(_INTEGER[piece.dtype]).flatten()
        if seen:
            keys = keys[keys >> bits == prefix]
        counts = torch.bincount((keys >> (bits - 16)).bitwise_and_(_BINS - 1), minlength=_BINS)
        total = counts if total is None else total.add_(counts.to(total.device))
    assert total is not None
    return total, piece.dtype


def _boundary_at_zero(pieces: Iterable[Tensor], shards: Shards) -> Boundary:
    """The boundary at zero, which has two bit patterns: -0.0 and 0.0 are one score."""
    below = ties = 0
    for piece in pieces:
        below += int((piece < 0).count_nonzero())
        ties += int((piece == 0).count_nonzero())
    below, ties = shards.add_up(torch.tensor([below, ties])).tolist()
    return Boundary(0.0, below, ties)


def bracket(sample: Tensor, share: float, shards: Shards = Unsharded()) -> tuple[float, float]:
    """Two scores of a sample, between which the one of this rank lies in all likelihood.

    Args:
        sample: Some of the scores, of one dimension.
        share: The rank that is sought, in (0, 1] of all scores.
        shards: Who has the rest of the sample.
    """
    size = int(shards.add_up(torch.tensor(len(sample))))
    ranks = (share - _MARGIN) * size, (share + _MARGIN) * size
    low, high = (min(max(1, round(rank)), size) for rank in ranks)
    return find_boundary(lambda: [sample], low, shards).value, find_boundary(
        lambda: [sample], high, shards
    ).value


def true_indices(rare: Tensor) -> Tensor:
    """Where a flat bool tensor is True. Looks at eight at a time, which pays when few are."""
    whole = len(rare) // 8 * 8
    eights = rare[:whole].view(torch.int64).nonzero() * 8
    near = (eights + torch.arange(8, device=rare.device)).flatten()
    if whole < len(rare):
        near = torch.cat([near, torch.arange(whole, len(rare), device=rare.device)])
    return near[rare.index_select(0, near)]
