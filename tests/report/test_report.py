"""Reports: widths as masks leave them, plots, pages, comparisons."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_prune import Channels, PerLayer, Pruner, Report, measure
from lightning_prune.report import plots
from lightning_prune.report.entries import HistoryEntry, Layer
from lightning_prune.report.plots import draw_history, draw_sparsity, draw_widths, layer_figure


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


class _Page(HTMLParser):
    """The rows of each table of a page, and the addresses that it refers to; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str | None] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in {"src", "href"}]
        self.rows += [[]] if tag == "tr" else []
        if tag not in {"meta", "input"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["td"]:
            self.rows[-1].append(data)


def test_the_page_holds_all_of_the_report_and_refers_to_nothing() -> None:
    layers = (Layer("a<b>", (8, 3), 24, 6, (4, 3), 4), Layer('"c"', (2, 8), 16, None))
    history = (
        HistoryEntry(0, 0, 0.0),
        HistoryEntry(0, 5, 0.0, 0.9),
        HistoryEntry(1, 5, 0.5),
        HistoryEntry(1, 9, 0.5, float("nan")),
    )
    report = Report(
        layers,
        42,
        168,
        60,
        frozen={"</script>": "is read & written"},
        unreconstructed={"d": "a reason"},
        protected=("e",),
        monitor="acc<1>",
        history=history,
        decisions=("epoch 1: halved",),
    )
    text = report.to_html()
    found = _Page(text)
    assert [row for row in found.rows if row] == [
        ["a<b>", "8x3 > 4x3", "24", "6", "75.00%", "8", "4"],
        ['"c"', "2x8", "16", "2"],
        ["</script>", "is read & written"],
        ["d", "a reason"],
        ["0", "0", "0.00%"],
        ["0", "5", "0.00%", "0.9"],
        ["1", "5", "50.00%"],
        ["1", "9", "50.00%", "nan"],
    ]
    assert not found.addresses
    assert "url(" not in text
    assert text.count("</script>") == 1
    assert all(each in found.text for each in ("epoch 1: halved", "acc<1>: 0.9 to 0.9", "e", "step 0 to 9"))


def test_headings_stand_where_their_columns_do_and_none_is_over_nothing() -> None:
    layers = (Layer("a", (8, 3), 24, 6), Layer("b", (2, 8), 16, None))
    text = Report(layers, 42, 168, 60, history=(HistoryEntry(0, 5, 0.5),)).to_html()
    assert re.findall(r"<th\b(.*?)>(.*?)</th>", text) == [
        ("", "layer"),
        ("", "shape"),
        *((' class="number"', name) for name in ("weights", "kept", "removed", "width before")),
        *((' class="number"', name) for name in ("epoch", "step", "sparsity")),
    ]


def test_a_comparison_gives_exact_numbers() -> None:
    dense = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    half = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    masks = {"0.weight": torch.ones(8, 3, dtype=torch.bool), "1.weight": torch.ones(2, 8, dtype=torch.bool)}
    fewer = {"0.weight": torch.zeros(4, 3, dtype=torch.bool).index_fill_(0, torch.tensor([1]), True)}
    found = measure(dense, masks, torch.ones(1, 3), seconds=0).compare(
        measure(half, fewer, torch.ones(1, 3), seconds=0)
    )
    assert found.numbers["sparsity"] == (0.0, 0.75)
    assert found.numbers["parameters"] == (50, 26)
    assert found.numbers["multiply-adds"] == (40, 20)
    assert found.numbers["multiply-adds with kept weights"] == (40, 11)
    assert found.numbers["bytes"] == (200, 104)
    assert found.numbers["metric"] == (None, None)
    assert found.widths == {"0.weight": (8, 1), "1.weight": (2, None)}
    lines = [re.sub(r"[^\w.+/-]+", " ", line).split() for line in str(found).splitlines()]
    assert ["parameters", "50", "26", "-24", "0.520"] in lines
    assert ["width", "of", "1.weight", "2", "-", "-", "-"] in lines


def test_names_in_the_plot_do_not_overlap() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    figure, _, by_layer, _ = layer_figure(160)
    draw_sparsity(by_layer, [f"layers.{place}.weight" for place in range(160)], [0.5] * 160, 0.5)
    figure.set_layout_engine("none")
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in by_layer.get_yticklabels()]
    assert len(boxes) == 160
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_the_legend_hides_no_bar_and_nothing_over_time_takes_no_room() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    figure, over_time, _, widths = layer_figure(3, over_time=False)
    assert over_time is None
    assert figure.get_figheight() == 3
    draw_widths(widths, ["a", "b", "c"], [8, 8, 8], [8, 8, 4])
    figure.draw_without_rendering()
    assert widths.get_legend().get_window_extent().y0 >= max(
        bar.get_window_extent().y1 for bar in widths.patches
    )


def test_a_plot_of_very_many_layers_names_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert layer_figure(10**6)[0].get_figheight() * 120 < 2**16
    monkeypatch.setattr(plots, "_TALLEST", 6)
    figure, _, by_layer, _ = layer_figure(100)
    draw_sparsity(by_layer, [str(place) for place in range(100)], [0.5] * 100, 0.5)
    assert [each.get_text() for each in by_layer.get_yticklabels()] == [str(4 * place) for place in range(25)]
    assert figure.get_figheight() < 10
