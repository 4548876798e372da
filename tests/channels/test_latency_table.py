"""Tables of measured times: files, and the time of a network between the widths that were timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import LatencyTable
from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.channels.latency.layer_times import monotone
from lightning_prune.channels.latency.table import LayerTimes

A, B = {"a": 1.0}, {"b": 1.0}
GRID = ((1.0, 2.0, 4.0), (3.0, 3.0, 9.0))
KNOTS = ((0.25, 1.0), (0.25, 0.5, 1.0))


def table(*layers: LayerTimes, **changed: Any) -> LatencyTable:
    """A table of groups of 8 and 16 units."""
    made = LatencyTable(
        "cpu: here", "float32", 1, ((1, 3),), {"a": 8, "b": 16}, 1.0, 1.0, 0.0, 0.0, 0.0, layers
    )
    return replace(made, **changed)


def line(axes: tuple[dict[str, float], ...], *seconds: float, least: float = 0.0) -> LayerTimes:
    """A layer that was timed at widths that are equally far from each other."""
    return LayerTimes(
        "line", axes, ((1.0,), tuple(numpy.linspace(least, 1, len(seconds)).tolist())), (seconds,)
    )


BOTH = table(LayerTimes("conv", (A, B), KNOTS, GRID))


def budget(of: LatencyTable) -> LatencyBudget:
    return LatencyBudget(of, of.groups)


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 16))
def test_between_the_widths_time_is_linear_in_each(a: int, b: int) -> None:
    rows = [numpy.interp(b / 16, KNOTS[1], row) for row in GRID]
    expected = numpy.interp(a / 8, KNOTS[0], rows)
    assert budget(BOTH).seconds({"a": a, "b": b}) == pytest.approx(expected, abs=1e-12)


def test_the_times_of_layers_are_added_scaled_and_the_rest_added() -> None:
    layers = (LayerTimes("conv", (A, B), KNOTS, GRID), line((A,), 0.0, 8.0), line((), 5.0))
    timed = budget(table(*layers, factor=2.0, rest=0.5))
    assert timed.total == 2 * (9 + 8 + 5) + 0.5
    kept = {"a": torch.arange(8) < 2, "b": torch.arange(16) < 8}
    assert timed.cost(kept) == pytest.approx(2 * (2 + 2 + 5) + 0.5)
    assert timed.within({"b"}).cost(kept) == pytest.approx(2 * (3 + 8 + 5) + 0.5)
    # what b shortens, with all of a
    assert timed.own({"b"}).cost(kept) == pytest.approx(2 * 3)
    assert timed.own({"b"}).total == 2 * 9


def test_an_axis_counts_all_its_groups_by_their_share_of_it() -> None:
    """A layer reads 8 channels of one group, and 24 of another, beside 8 of the input."""
    joined = budget(table(line(({"a": 0.2, "b": 0.6},), 0.0, 40.0)))
    assert joined.seconds({"a": 4, "b": 4}) == pytest.approx(40 - 4 - 18)


def test_of_three_axes_the_geometric_mean_counts() -> None:
    three = budget(table(line((A, B, {"a": 0.5}), 0.0, 1.0)))
    assert three.seconds({"a": 4, "b": 2}) == pytest.approx((1 / 2 * 1 / 8 * 3 / 4) ** (1 / 3))


@settings(max_examples=20)
@given(st.lists(st.lists(st.floats(0, 9), min_size=3, max_size=3), min_size=2, max_size=4))
def test_fewer_units_never_take_longer(times: list[list[float]]) -> None:
    rows = monotone(torch.tensor(times, dtype=torch.float64))
    knots = tuple(numpy.linspace(0.25, 1, len(times)).tolist()), (0.25, 0.5, 1.0)
    timed = budget(table(LayerTimes("conv", (A, B), knots, tuple(map(tuple, rows.tolist())))))
    seconds = torch.tensor([[timed.seconds({"a": a, "b": b}) for b in range(2, 17, 2)] for a in range(2, 9)])
    assert float(seconds.diff(dim=0).min()) >= -1e-6
    assert float(seconds.diff(dim=1).min()) >= -1e-6


def test_what_is_monotone_stays_and_an_outlier_is_halved() -> None:
    grid = torch.tensor(GRID)
    assert torch.equal(monotone(grid), grid)
    assert monotone(torch.tensor([[1.0, 9.0, 1.0, 9.0]])).tolist() == [[1.0, 5.0, 5.0, 9.0]]


def test_a_file_holds_the_table(tmp_path: Path) -> None:
    BOTH.save(path := tmp_path / "table.json")
    assert LatencyTable.load(path) == BOTH
    assert repr(BOTH) == "<latency table of cpu: here, batch of 1>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, r"has version 2, this lightning_prune reads 1"),
        ({"batch": 0}, r"batch is 0, expected a whole number of at least 1"),
        ({"dense": float("nan")}, r"dense is nan, expected a number above 0"),
        ({"groups": {"a": 8}}, r"layers should be of groups that the table has"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    BOTH.save(path := tmp_path / "table.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said) as error:
        LatencyTable.load(path)
    assert str(error.value).startswith(f"table={str(path)!r}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_file_of_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"^table=.*table.json"):
        LatencyTable.load(path)


def test_rows_must_be_as_long_as_their_knots() -> None:
    short = replace(BOTH.layers[0], seconds=((1.0, 2.0), (3.0, 4.0)))
    from lightning_prune.channels.latency.table import TABLE
    from lightning_prune.core import schema

    with pytest.raises(ValueError, match=r"layers\[0\].seconds should be one row for each"):
        schema.read(table(short).to_state(), TABLE, "the table")


def test_noise_is_told_with_what_to_do() -> None:
    assert BOTH.noise is None
    noise = replace(BOTH, error=0.08, spread=0.2).noise
    assert noise is not None
    assert "8.0% (median)" in noise
    assert "measure again with nothing else running" in noise
