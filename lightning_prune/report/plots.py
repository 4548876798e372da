"""Plots on matplotlib axes, of plain numbers: sparsity and widths by layer, sensitivity, history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def draw_sparsity(axes: Any, names: Sequence[str], removed: Sequence[float], whole: float) -> None:
    """Draw the removed share of each layer as a bar, and that of all layers together as a line."""
    axes.barh(names, removed)
    axes.invert_yaxis()
    axes.set(title="Sparsity by layer", xlabel="share removed", xlim=(0, 1))
    axes.axvline(whole, color="black", linestyle="--", linewidth=1)


def draw_widths(axes: Any, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Draw the width of each layer before and after pruning as two overlaid bars."""
    axes.barh(names, before, color="lightgrey", label="before")
    axes.barh(names, after, color="tab:blue", label="after")
    axes.invert_yaxis()
    axes.set(title="Widths by layer", xlabel="filters or neurons")
    axes.legend()


def draw_sensitivity(
    axes: Any, ratios: Sequence[float], values: Mapping[str, Sequence[float]], dense: float, metric: str
) -> None:
    """Draw the metric against the removed share as one line per layer, and the dense metric as another line."""
    axes.set(title="One layer at a time", xlabel="share removed", ylabel=metric)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1)
    for name, line in values.items():
        axes.plot([0, *ratios], [dense, *line], marker=".", label=name)
    axes.legend(fontsize="small")


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
    if sparsities:
        axes.step(*zip(*sparsities, strict=True), where="post", color="tab:blue")
    if metrics:
        twin = axes.twinx()
        twin.plot(*zip(*metrics, strict=True), color="tab:orange", marker=".")
        twin.set_ylabel(metric or "", color="tab:orange")
