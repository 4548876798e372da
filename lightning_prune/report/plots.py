"""What a report draws; needs matplotlib axes, and nothing of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def draw_sparsity(axes: Any, names: Sequence[str], removed: Sequence[float], whole: float) -> None:
    """A bar a layer: the share removed, beside that of all layers together."""
    axes.barh(names, removed)
    axes.invert_yaxis()
    axes.set(title="Sparsity by layer", xlabel="share removed", xlim=(0, 1))
    axes.axvline(whole, color="black", linestyle="--", linewidth=1)


def draw_widths(axes: Any, names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """Two bars a layer, one over the other."""
    axes.barh(names, before, color="lightgrey", label="before")
    axes.barh(names, after, color="tab:blue", label="after")
    axes.invert_yaxis()
    axes.set(title="Widths by layer", xlabel="filters or neurons")
    axes.legend()


def draw_sensitivity(
    axes: Any, ratios: Sequence[float], values: Mapping[str, Sequence[float]], dense: float, metric: str
) -> None:
    """A line a layer: the metric against the share removed, and that of the dense network."""
    axes.set(title="One layer at a time", xlabel="share removed", ylabel=metric)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1)
    for name, line in values.items():
        axes.plot([0, *ratios], [dense, *line], marker=".", label=name)
    axes.legend(fontsize="small")


def draw_history(
    axes: Any, sparsities: Sequence[tuple[int, float]], metrics: Sequence[tuple[int, float]], metric: str | None
) -> None:
    """Sparsity, and the monitored metric if it was ever seen, against optimizer steps."""
    axes.set(title="Over time", xlabel="optimizer steps", ylim=(0, 1))
    axes.set_ylabel("sparsity", color="tab:blue")
    if sparsities:
        axes.step(*zip(*sparsities, strict=True), where="post", color="tab:blue")
    if metrics:
        twin = axes.twinx()
        twin.plot(*zip(*metrics, strict=True), color="tab:orange", marker=".")
        twin.set_ylabel(metric or "", color="tab:orange")
