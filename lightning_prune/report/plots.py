"""Plots on matplotlib axes, of plain numbers: sparsity and widths by layer, sensitivity, history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_ROW = 0.22  # inches of height that a name takes
_TALLEST = 200  # inches of a figure: matplotlib draws at most 65,535 points in height


def layer_figure(layers: int, over_time: bool = True) -> tuple[Any, Any, Any, Any]:
    """Return a figure that is high enough for the names of all layers, and its axes.

    Args:
        layers: Number of layers.
        over_time: Whether there is something to show over time.

    Returns:
        The figure, wide axes at its top or None, and two axes under them that share the names of the layers.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    heights = (*((3.5,) if over_time else ()), min(_TALLEST, max(2.0, _ROW * layers) + 1))
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    left = figure.add_subplot(grid[-1, 0])
    right = figure.add_subplot(grid[-1, 1], sharey=left)
    right.tick_params(labelleft=False)
    return figure, figure.add_subplot(grid[0, :]) if over_time else None, left, right


def _draw_bars(axes: Any, names: Sequence[str], values: Sequence[float], **options: Any) -> None:
    """Draw a bar for each name from top to bottom, and as many of the names as find room."""
    places = range(len(names))
    axes.barh(places, values, **options)
    step = max(1, math.ceil(len(names) * _ROW / _TALLEST))
    axes.set_yticks(places[::step], names[::step])
    axes.set_ylim(len(names) - 0.4, -0.6)


def draw_sparsity(axes: Any, names: Sequence[str], removed: Sequence[float], whole: float) -> None:
    """Draw the removed share of each layer as a bar, and that of all layers together as a line."""
    _draw_bars(axes, names, removed)
    axes.set(title="Sparsity by layer", xlabel="share removed", xlim=(0, 1))
    axes.axvline(whole, color="black", linestyle="--", linewidth=1)


def draw_widths(axes: Any, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Draw the width of each layer before and after pruning as two overlaid bars."""
    _draw_bars(axes, names, before, color="lightgrey", label="before")
    _draw_bars(axes, names, after, color="tab:blue", label="after")
    axes.set(title="Widths by layer", xlabel="filters or neurons")
    # above the bars, of which it would hide some
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)


def draw_sensitivity(
    axes: Any, ratios: Sequence[float], values: Mapping[str, Sequence[float]], dense: float, metric: str
) -> None:
    """Draw the metric against the removed share as one line per layer, and the dense metric as another line."""
    axes.set(title="One layer at a time", xlabel="share removed", ylabel=metric)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1)
    for name, line in values.items():
        axes.plot([0, *ratios], [dense, *line], marker=".", label=name)
    axes.legend(loc="lower left", fontsize="small")  # metrics fall to the right


def draw_history(
    axes: Any, sparsities: Sequence[tuple[int, float]], metrics: Sequence[tuple[int, float]], metric: str | None
) -> None:
    """Draw sparsity, and the monitored metric if it was ever measured, against optimizer steps.

    Args:
        axes: Matplotlib axes.
        sparsities: Optimizer step and sparsity of each history entry.
        metrics: Optimizer step and metric of each measurement.
        metric: Name of the metric.
    """
    axes.set(title="Over time", xlabel="optimizer steps", ylim=(0, 1))
    axes.set_ylabel("sparsity", color="tab:blue")
    axes.step(*zip(*sparsities, strict=True), where="post", color="tab:blue")
    if metrics:
        twin = axes.twinx()
        twin.plot(*zip(*metrics, strict=True), color="tab:orange", marker=".")
        twin.set_ylabel(metric or "", color="tab:orange")
