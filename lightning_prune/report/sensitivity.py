"""Sensitivity analysis: a metric against the removed share, for each layer pruned alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from lightning_prune.core.parts import check_part, is_number
from lightning_prune.core.progress import allow_progress_bars, progress_bar
from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import Magnitude
from lightning_prune.report.plots import draw_sensitivity
from lightning_prune.report.tables import format_table
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import remove_lowest
from lightning_prune.statistics.sums import Statistics
from lightning_prune.structures.base import Structure
from lightning_prune.structures.weights import Unstructured
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.shards import check_unsharded

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Sensitivity:
    """Values of a metric with part of the units of a single group removed.

    Args:
        metric: Name of the metric.
        dense: Value of the metric with nothing removed.
        ratios: Removed shares of a group's units.
        values: Group name to the value of the metric at each ratio.
        frozen: Name of each parameter or group that is not pruned to the reason.
    """

    metric: str
    dense: float
    ratios: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]
    frozen: Mapping[str, str]

    def table(self) -> str:
        """Return the values as a text table with one row per group."""
        head = (self.metric, *(f"{100 * ratio:.4g} % removed" for ratio in self.ratios))
        rows = [(name, *(f"{value:.4g}" for value in line)) for name, line in self.values.items()]
        rows.append(("nothing removed", f"{self.dense:.4g}", *("" for _ in self.ratios[1:])))
        lines = [f"{name} stays dense: {reason}" for name, reason in self.frozen.items()]
        return format_table(head, rows, 1) + "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot the values to an image file, as one line per group.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, max(5.0, 0.22 * len(self.values))), layout="constrained")
        draw_sensitivity(figure.subplots(), self.ratios, self.values, self.dense, self.metric)
        figure.savefig(path, dpi=120)

    def to_json(self) -> str:
        """Return all fields as JSON."""
        return json.dumps(asdict(self), indent=2)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = RATIOS,
    criterion: Criterion = Magnitude(),
    structure: Structure = Unstructured(),
    example: Any = None,
    metric: str = "metric",
    progress: bool = True,
) -> Sensitivity:
    """Prune each unit group alone, to several ratios and without retraining, and evaluate a metric each time.

    This is the sensitivity analysis of Li et al. 2017, "Pruning Filters for Efficient ConvNets", ICLR. Layers
    whose metric falls at small ratios should be excluded from pruning, or pruned less. Of a group,
    ``round(ratio * units)`` units are removed, but at least one is kept; the width rounding of the structure
    (``round_to``) is ignored.

    Args:
        model: The model; its weights are restored afterwards.
        evaluate: Returns the metric of the model. It is called once with nothing removed, and once for each
            group and ratio.
        ratios: Shares of a group's units to remove, in (0, 1).
        criterion: Scores the units; it must need weights only.
        structure: Defines the units: which weights are removed together.
        example: As for :class:`Pruner`, for structures that need one.
        metric: Name of the metric.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument is wrong, or there is nothing to prune.

    >>> model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 1, bias=False))
    >>> def left(model):
    ...     return float(model[0].weight.count_nonzero())
    >>> found = sensitivity(model, left, ratios=[0.5], progress=False)
    >>> found.dense, found.values
    (12.0, {'0.weight': (6.0,), '1.weight': (12.0,)})
    """
    check_part(criterion, Criterion, "criterion")
    check_part(structure, Structure, "structure")
    check_unsharded(model, "sensitivity")
    if criterion.needs:
        raise ValueError(
            f"criterion={criterion!r} needs gradients, activations or a loss, and there are none here: choose"
            " one that looks at weights alone, such as Magnitude()."
        )
    for ratio in ratios:
        if not is_number(ratio) or not 0 < ratio < 1:
            raise ValueError(f"ratios={ratios!r} must be numbers between 0 and 1.")
    if not ratios:
        raise ValueError(f"ratios={ratios!r} must be at least one.")
    structure.keep_copies_apart(model)
    with allow_progress_bars(progress):
        units = structure.units(model, example)
        units = replace(units, groups=tuple(replace(group, minimum=1, multiple=1) for group in units.groups))
        units = units.without_refused(criterion.refuses, repr(criterion))
        dense = float(evaluate(model))
        values = {}
        for group in progress_bar(units.groups, "Prune one layer at a time"):
            line = []
            for ratio in ratios:
                with _without(model, group, criterion, ratio):
                    line.append(float(evaluate(model)))
            values[group.name] = tuple(line)
    return Sensitivity(metric, dense, tuple(ratios), values, units.frozen)


@contextmanager
@torch.no_grad()
def _without(model: nn.Module, group: UnitGroup, criterion: Criterion, ratio: float) -> Iterator[None]:
    """Mask a share of one group's units within a block, and restore the weights afterwards."""
    kept = torch.ones(group.shape, dtype=torch.bool, device=group.slices[0].weight.device)
    statistics = Statistics.zeros((), kept, group.dtype)
    remove_lowest([Candidates(group, kept, criterion, statistics, group.dtype)], round(ratio * group.size))
    before = [(part.weight, part.weight.clone()) for part in group.masked]
    store = MaskStore(model, dict.fromkeys(part.name for part in group.masked))
    for part in group.masked:
        store.masks[part.name].logical_and_(part.spread(kept))
    try:
        store.apply_()
        yield
    finally:
        for weight, values in before:
            weight.copy_(values)
