"""The times of layers by width, from runs at several combinations of widths: medians, made monotone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.channels.latency.design import Axis
from lightning_prune.channels.latency.module_calls import Key
from lightning_prune.channels.latency.table import LayerTimes


class Run(NamedTuple):
    """What was measured at one combination of widths; times are shares of that of the dense network, in turn.

    Attributes:
        counts: The number of units of each group.
        whole: The time of a pass.
        spread: How far single passes are from that: the median difference, as a share of it.
        calls: The time that each call of a module takes by itself.
        callers: The call that each call was made in.
        dense: The seconds of a pass of the dense network.
    """

    counts: Mapping[str, int]
    whole: float
    spread: float
    calls: Mapping[Key, float]
    callers: Mapping[Key, Key | None]
    dense: float


def layer_times(
    runs: Sequence[Run],
    axes: Mapping[Key, Sequence[Axis]],
    sizes: Mapping[str, int],
    colours: Mapping[str, int],
) -> tuple[LayerTimes, ...]:
    """Return the times of all layers in seconds.

    Modules that not every network calls, as where a smaller one takes a fused operation apart, count for the
    module that calls them.

    Args:
        runs: The runs; the last one is of the dense network.
        axes: The axes of each call of a module.
        sizes: The number of units of each group.
        colours: The colour of each group: those of two colours are at all pairs of their widths in the runs.
    """
    dense = median(run.dense for run in runs)
    common = axes.keys() & frozenset[Key].intersection(*(frozenset(run.calls) for run in runs))
    totals: dict[tuple[str, tuple[Axis, ...]], list[float]] = defaultdict(lambda: [0.0] * len(runs))
    for number, run in enumerate(runs):
        for key, share in run.calls.items():
            owner: Key | None = key
            while owner is not None and owner not in common:
                owner = run.callers[owner]
            if owner is not None:
                totals[owner[0], tuple(axes[owner])][number] += dense * share
    shares = [{name: count / sizes[name] for name, count in run.counts.items()} for run in runs]
    found = []
    for (name, own), times in totals.items():
        apart = len(own) == 2 and colours[own[0][0][0]] != colours[own[1][0][0]]
        fit = _grid if apart else _line
        knots, seconds = fit([[_share(axis, each) for axis in own] for each in shares], times)
        found.append(LayerTimes(name, tuple(map(dict, own)), knots, _rows(monotone(seconds))))
    return tuple(found)


def _share(axis: Axis, shares: Mapping[str, float]) -> float:
    """Return the share of an axis that is left."""
    return 1 - sum(part * (1 - shares[name]) for name, part in axis)


def _grid(
    points: Sequence[Sequence[float]], times: Sequence[float]
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], Tensor]:
    """Return the knots of two axes, and the median time at each pair of them."""
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for (one, other), seconds in zip(points, times, strict=True):
        cells[one, other].append(seconds)
    rows, columns = (sorted({point[side] for point in points}) for side in (0, 1))
    grid = [[median(cells[row, column]) for column in columns] for row in rows]
    return (tuple(rows), tuple(columns)), torch.tensor(grid, dtype=torch.float64)


def _line(
    points: Sequence[Sequence[float]], times: Sequence[float]
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], Tensor]:
    """Return the geometric means of all axes as knots, and the times there.

    Of many the least and the largest stay, and the others are put together to as many as a group has widths.
    """
    cells: dict[float, list[float]] = defaultdict(list)
    for point, seconds in zip(points, times, strict=True):
        mean = math.prod(point) ** (1 / max(1, len(point)))
        cells[round(mean, 12)].append(seconds)
    places = sorted(cells)
    most = max(3, math.isqrt(len(points)))  # the number of widths
    parts = [[place] for place in places]
    if len(places) > most:
        inner = torch.tensor(places[1:-1], dtype=torch.float64).tensor_split(most - 2)
        parts = [places[:1], *(part.tolist() for part in inner), places[-1:]]
    line = [fmean(median(cells[place]) for place in part) for part in parts]
    return ((1.0,), tuple(map(fmean, parts))), torch.tensor([line], dtype=torch.float64)


def monotone(times: Tensor) -> Tensor:
    """Return the mean of the largest monotone function below the times and of the least one above.

    Args:
        times: At least 0 or, where clocks disagree, a little less; widths grow along both dimensions.

    >>> monotone(torch.tensor([[1.0, 3.0, 2.0, 4.0]]))
    tensor([[1.0000, 2.5000, 2.5000, 4.0000]])
    """
    above = below = times.clamp_min(0)
    for dim in (0, 1):
        above = above.cummax(dim).values
        below = below.flip(dim).cummin(dim).values.flip(dim)
    return (above + below) / 2


def _rows(times: Tensor) -> tuple[tuple[float, ...], ...]:
    rows: Iterable[list[float]] = times.tolist()
    return tuple(map(tuple, rows))
