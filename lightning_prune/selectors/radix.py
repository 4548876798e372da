"""Exact selection of the k-th smallest score by radix histograms: no sort, and no tensor that holds all scores.

A histogram of the scores' leading 16 bits tells which of 65,536 bins holds the k-th smallest. A histogram of
the next 16 bits, over the scores in that bin, narrows it down, and so on until no bits are left. Each pass
reads the scores once and adds counts, so scores may come in pieces and lie in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.units.shards import Shards, Unsharded

_BINS = 1 << 16
_MARGIN = 0.003  # half the width of the bracket, as a share of all scores; those within are held in memory
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Boundary:
    """The end of the ``count`` smallest scores.

    Args:
        value: The ``count``-th smallest score.
        below: Number of scores that are smaller than ``value``.
        ties: Number of scores that are equal to ``value``.
    """

    value: float
    below: int
    ties: int


def find_boundary(pieces: Callable[[], Iterable[Tensor]], count: int, shards: Shards = Unsharded()) -> Boundary:
    """Find the ``count``-th smallest score.

    Args:
        pieces: Returns tensors that together hold all scores: of any shape, all float32 or all float64, without
            nan, and the same at every call.
        count: A rank from 1 to the number of scores in all processes.
        shards: The processes that hold the other scores.

    Returns:
        The exact boundary, the same in all processes.

    >>> scores = [torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 2.0]])]
    >>> find_boundary(lambda: scores, 2)
    Boundary(value=2.0, below=1, ties=2)
    """
    prefix, seen, below = 0, 0, 0
    while True:
        here, dtype = _histogram(pieces(), prefix, seen)
        histogram = shards.add_up(here)
        bins = torch.arange(_BINS, device=histogram.device)
        # The larger the bits of a negative float, the lower its value.
        order = bins if seen and prefix >= 0 else bins.flip(0)
        if not seen:
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
    """Count the scores of each value of 16 bits, among those that share the bits before.

    Args:
        pieces: The scores of this process.
        prefix: The leading ``seen`` bits that a score must have to be counted, read as a signed integer.
        seen: Number of leading bits that are known, a multiple of 16.

    Returns:
        65,536 counts by the value of the next 16 bits, and the data type of the scores.
    """
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
    """Return the boundary at zero, which has two bit patterns: -0.0 and 0.0 are the same score."""
    below = ties = 0
    for piece in pieces:
        below += int((piece < 0).count_nonzero())
        ties += int((piece == 0).count_nonzero())
    below, ties = shards.add_up(torch.tensor([below, ties])).tolist()
    return Boundary(0.0, below, ties)


def bracket(sample: Tensor, share: float, shards: Shards = Unsharded()) -> tuple[float, float]:
    """Return two scores of a sample, between which the score of a given rank very likely lies.

    Args:
        sample: A sample of the scores of this process, of one dimension.
        share: The rank divided by the number of scores, in (0, 1].
        shards: The processes that hold the rest of the sample.
    """
    size = int(shards.add_up(torch.tensor(len(sample))))
    ranks = (share - _MARGIN) * size, (share + _MARGIN) * size
    counts = (min(max(1, round(rank)), size) for rank in ranks)
    low, high = (find_boundary(lambda: [sample], count, shards).value for count in counts)
    return low, high


def true_indices(rare: Tensor) -> Tensor:
    """Return the indices of the True entries of a flat bool tensor.

    Eight entries are tested at a time, which is fast if few are True.
    """
    whole = len(rare) // 8 * 8
    eights = rare[:whole].view(torch.int64).nonzero() * 8
    near = (eights + torch.arange(8, device=rare.device)).flatten()
    if whole < len(rare):
        near = torch.cat([near, torch.arange(whole, len(rare), device=rare.device)])
    return near[rare.index_select(0, near)]
