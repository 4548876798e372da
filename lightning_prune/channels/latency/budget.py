"""The time of a network as a function of the units that are kept: a table of measured times, interpolated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.channels.latency.table import LatencyTable, LayerTimes

_LEAST = 1e-9  # the least share of an axis, whose logarithm is taken


class LatencyBudget:
    """The seconds of a forward pass, by the number of units that each group keeps.

    Between the widths at which a layer was timed its time is linear in each width, and outside of them that of
    the nearest.

    Args:
        table: The measured times.
        names: The groups whose units may be removed; all units of the others are kept.
        parts: Whether only the layers count that these groups shorten, without the rest.
    """

    def __init__(self, table: LatencyTable, names: Collection[str], *, parts: bool = False) -> None:
        self._table, self._names, self._parts = table, frozenset(names), parts
        shortened = [layer for layer in table.layers if not all(map(self._names.isdisjoint, layer.axes))]
        self._times = _Interpolation(shortened if parts else table.layers, list(table.groups))

    @property
    def total(self) -> float:
        """The seconds of the network with all units kept."""
        return self.seconds({})

    def cost(self, kept: Mapping[str, Tensor]) -> float:
        """Return the seconds of the network without the removed units.

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
        """
        return self.seconds(
            {name: int(units.count_nonzero()) for name, units in kept.items() if name in self._names}
        )

    def seconds(self, counts: Mapping[str, int]) -> float:
        """Return the seconds of the network by the number of units that groups keep; others keep all."""
        shares = [counts.get(name, size) / size for name, size in self._table.groups.items()]
        rest = 0.0 if self._parts else self._table.rest
        times = self._times.sum(torch.tensor(shares, dtype=torch.float64))
        return max(0.0, rest + self._table.factor * times)  # noise may make small networks take less than none

    def within(self, names: Collection[str]) -> LatencyBudget:
        """Return the budget of the same network, if only units of the groups ``names`` can be removed."""
        return LatencyBudget(self._table, self._names.intersection(names), parts=self._parts)

    def own(self, names: Collection[str]) -> LatencyBudget:
        """Return the time of the layers that the groups ``names`` shorten, all other units kept."""
        return LatencyBudget(self._table, self._names.intersection(names), parts=True)


class _Interpolation:
    """The sum of the times of layers, each interpolated in its two knots; all layers at once.

    Args:
        layers: The layers.
        groups: Names of all groups, in the order of the shares.
    """

    def __init__(self, layers: Sequence[LayerTimes], groups: Sequence[str]) -> None:
        place = {name: number for number, name in enumerate(groups)}
        axes: dict[tuple[tuple[str, float], ...], int] = {}
        rows, columns = [], []
        for layer in layers:
            own = [axes.setdefault(tuple(sorted(axis.items())), len(axes)) for axis in layer.axes]
            apart = len(layer.knots[0]) > 1
            rows.append(dict.fromkeys(own[:1], 1.0) if apart else {})
            columns.append(dict.fromkeys(own[1:], 1.0) if apart else {each: 1 / len(own) for each in own})
        self._weights = _matrix([{place[name]: part for name, part in axis} for axis in axes], len(groups))
        self._powers = [_matrix(side, len(axes)) for side in (rows, columns)]
        self._knots = [_padded([layer.knots[side] for layer in layers]) for side in (0, 1)]
        height, width = (knots.shape[1] for knots in self._knots)
        filled = [_padded([*layer.seconds, *[layer.seconds[-1]] * height][:height], width) for layer in layers]
        self._seconds = torch.stack(filled) if filled else torch.zeros(0, height, width, dtype=torch.float64)

    def sum(self, shares: Tensor) -> float:
        """Return the sum of all times.

        Args:
            shares: The kept share of the units of each group.
        """
        logs = (1 - self._weights @ (1 - shares)).clamp_min(_LEAST).log()
        (top, down), (left, across) = (
            _place(knots, (powers @ logs).exp())
            for knots, powers in zip(self._knots, self._powers, strict=True)
        )
        layer = torch.arange(len(self._seconds))
        upper, lower = (
            self._seconds[layer, row, left] * (1 - across) + self._seconds[layer, row, left + 1] * across
            for row in (top, top + 1)
        )
        return float((upper * (1 - down) + lower * down).sum())


def _matrix(rows: Sequence[Mapping[int, float]], width: int) -> Tensor:
    matrix = torch.zeros(len(rows), width, dtype=torch.float64)
    for number, row in enumerate(rows):
        for place, value in row.items():
            matrix[number, place] = value
    return matrix


def _padded(rows: Sequence[Sequence[float]], least: int = 2) -> Tensor:
    """Return rows of the same length, at least ``least``: the last number of each is repeated."""
    longest = max(least, *map(len, rows), 0)
    same = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return torch.tensor(same, dtype=torch.float64).view(len(rows), longest)


def _place(knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of the knot of its row that is next below each value, and how far on it is, 0 to 1."""
    high = torch.searchsorted(knots, values[:, None].contiguous()).squeeze(1).clamp(1, knots.shape[1] - 1)
    rows = torch.arange(len(knots))
    low, gap = knots[rows, high - 1], knots[rows, high] - knots[rows, high - 1]
    return high - 1, ((values - low) / gap.clamp_min(torch.finfo(gap.dtype).tiny)).clamp(0, 1)
