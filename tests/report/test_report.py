"""Reports: widths as masks leave them, before and after in the plot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import Channels, PerLayer, Pruner, measure
from lightning_prune.report.plots import draw_history, draw_sparsity, draw_widths


def test_widths_count_the_rows_in_which_something_is_left() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    pruner = Pruner(
        model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=torch.ones(1, 3)
    )
    pruner.prune(1.0)
    widths = {layer.name: (layer.shape[0], layer.width) for layer in measure(model, pruner.masks).layers}
    assert {name: widths[f"{name}.weight"] for name in "024"} == {"0": (8, 4), "2": (6, 3), "4": (2, 2)}
    assert widths["0.bias"] == (8, 4)


def test_the_plot_shows_what_it_is_given() -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure()
    first, second, third = figure.subplots(1, 3)
    draw_sparsity(first, ["a", "b"], [0.25, 0.5], 0.4)
    assert [bar.get_width() for bar in first.patches] == [0.25, 0.5]
    draw_widths(second, ["a", "b"], [8, 6], [4, 3])
    assert [bar.get_width() for bar in second.patches] == [8, 6, 4, 3]
    assert [label.get_text() for label in second.get_legend().get_texts()] == ["before", "after"]
    draw_history(third, [(0, 0.0), (5, 0.5)], [(3, 0.9)], "val_acc")
    assert third.lines[0].get_xydata().tolist() == [[0, 0], [5, 0.5]]
    assert figure.axes[3].lines[0].get_xydata().tolist() == [[3, 0.9]]
    assert figure.axes[3].get_ylabel() == "val_acc"
