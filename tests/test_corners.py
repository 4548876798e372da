"""Corners: single units, half precision, tied names, states of other selectors, types that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import (
    Criterion,
    Fisher,
    Global,
    Gradient,
    Linear,
    Magnitude,
    NofM,
    OneShot,
    PerLayer,
    Pruner,
    Random,
    Steps,
    Structure,
    Taylor,
    Threshold,
    Unstructured,
)
from lightning_prune.schedules.moments import FitLength
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice


class Rows(Structure):
    """One group a Linear, of its output rows and their biases."""

    def units(self, model: nn.Module, example: Any = None) -> Units:
        groups = [
            UnitGroup(
                name,
                tuple(AxisSlice(f"{name}.{leaf}", part, dim=0) for leaf, part in module.named_parameters()),
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        return Units(tuple(groups), {})


def linears(*weights):
    layers = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data = torch.tensor(weight)
        layers.append(layer)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # w g: 2 -2 and a bias of 3 in the first row, -2 2 and 1 in the second
        (Gradient(), [4.0, 5.5]),
        (Taylor(), [9.0, 1.0]),
        (Fisher(), [8.5, 4.5]),
    ],
)
def test_a_bias_belongs_to_its_row(criterion, expected) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [4.0, 0.5]])
    model[0].bias.data = torch.tensor([3.0, -1.0])
    pruner = Pruner(model, 0.5, criterion=criterion, structure=Rows(), schedule=None)
    pruner.observe({"0.weight": torch.tensor([[2.0, 1.0], [-0.5, 4.0]]), "0.bias": torch.tensor([1.0, -1.0])})
    sums = pruner.state_dict()["statistics"]["0"]["sums"]["score"]
    assert sums.tolist() == expected
    pruner.prune(1.0)
    lost = expected.index(min(expected))
    assert (model[0].weight[lost] == 0).all()
    assert model[0].bias[lost] == 0
    assert pruner.masks["0.bias"].tolist() == [i != lost for i in range(2)]


def test_seeds_give_other_draws() -> None:
    group = Unstructured().units(nn.Linear(40, 30)).groups[0]
    none = Statistics.zeros((), torch.ones(group.shape), group.dtype)
    seeds = [0, 1, 2, -1, 2**31, 2**40]
    drawn = {tuple(Random(seed).score(group, none).flatten().tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_half_precision_weights_are_scored_in_float32(dtype, order) -> None:
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    model.weight.data = torch.tensor([[1e-4, 2e-4]], dtype=dtype)[:, order]
    pruner = Pruner(model, 0.5, criterion=Magnitude(p=3), schedule=None)
    pruner.prune(1.0)
    assert pruner.masks["weight"].tolist() == [[index == 1 for index in order]]


def test_a_threshold_at_the_best_score_keeps_it() -> None:
    model = linears([[0.1, 0.3]])
    pruner = Pruner(model, selector=Threshold(value=0.3), schedule=None)
    pruner.prune(1.0)
    assert pruner.masks["0.weight"].tolist() == [[False, True]]


def test_a_deviation_of_one_unit_empties_no_layer() -> None:
    pruner = Pruner(linears([[1.0]], [[1.0, 2.0, 3.0]]), selector=Threshold(std=1.0), schedule=None)
    pruner.prune(1.0)  # and no warning about degrees of freedom
    assert pruner.masks["0.weight"].all()


def test_a_deviation_of_one_survivor_empties_no_layer() -> None:
    model = linears([[1.0, 1.0, 1.0, 1.0]])
    pruner = Pruner(model, criterion=Gradient(), selector=Threshold(std=1.0), schedule=None)
    for _ in range(2):
        pruner.observe({"0.weight": torch.tensor([[0.0, 0.0, 0.0, 5.0]])})
        pruner.prune(1.0)
        assert pruner.masks["0.weight"].tolist() == [[False, False, False, True]]


def test_han_measures_the_weights_that_are_there() -> None:
    model = linears([[0.1, -0.9, 2.0, -2.2, 10.0]])
    pruner = Pruner(model, selector=Threshold(std=0.1), schedule=None)
    pruner.prune(1.0)
    kept = pruner.masks["0.weight"]
    assert kept.tolist() == [[False, True, True, True, True]]
    weight = model[0].weight.detach()
    group = Unstructured().units(model).groups[0]
    found = Magnitude().deviation(group, weight.abs(), kept)
    assert found == pytest.approx(float(weight[kept].std()))


def test_ties_at_the_edge_are_no_protection() -> None:
    pruner = Pruner(linears([[1.0] * 8]), 0.5, schedule=None)
    pruner.prune(1.0)
    assert pruner.masks["0.weight"].sum() == 4
    assert pruner.protected == set()


@pytest.mark.parametrize("selector", [Global(), PerLayer()])
def test_a_count_out_of_reach_is_reported(selector) -> None:
    pruner = Pruner(linears([[1.0, 2.0]]), 0.9, selector=selector, schedule=None)
    pruner.prune(1.0)
    assert pruner.protected == {"0.weight"}


def test_a_pattern_brings_nothing_back_that_another_selector_removed() -> None:
    model = linears([[float(i) for i in range(1, 9)], [float(i) for i in range(9, 17)]])
    before = Pruner(model, 0.5, schedule=None)
    before.prune(1.0)
    gone = ~before.masks["0.weight"]
    after = Pruner(model, selector=NofM(1, 4), schedule=None)
    after.load_state_dict(before.state_dict())
    after.prune(1.0)
    assert not (after.masks["0.weight"] & gone).any()


def test_a_pattern_holds_even_if_as_much_is_gone_already() -> None:
    model = linears([[float(i) for i in range(1, 9)], [float(i) for i in range(9, 17)]])
    before = Pruner(model, 0.5, schedule=None)
    before.prune(1.0)
    after = Pruner(model, selector=NofM(2, 4), schedule=None)
    after.load_state_dict(before.state_dict())
    after.prune(1.0)
    assert int(after.masks["0.weight"].unflatten(-1, (-1, 4)).sum(-1).max()) <= 2


@pytest.mark.parametrize("exclude", ["1", "1.weight"])
def test_exclude_reaches_a_tied_weight_by_either_name(exclude) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [group.name for group in Unstructured(exclude=exclude).units(model).groups] == ["2.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_one_pattern_that_is_no_string(argument) -> None:
    with pytest.raises(ValueError, match="must be a pattern or a list of them"):
        Unstructured(**{argument: 5})


@pytest.mark.parametrize("shares", [None, 0.5, {"2ep": "0.5"}, {"2ep": None}])
def test_shares_of_another_type(shares) -> None:
    with pytest.raises(ValueError, match="shares="):
        Steps(shares)


def test_a_pattern_and_a_target_of_another_type() -> None:
    with pytest.raises(ValueError, match="target='half'"):
        Pruner(nn.Linear(8, 8), "half", selector=NofM(2, 4))


@pytest.mark.parametrize(
    ("horizon", "end"),
    [
        (FitLength(None, 30, 10), "3ep"),
        (FitLength(10, 38, 10), "3.6ep"),
        (FitLength(None, 38, 10), "3.5ep"),
    ],
)
def test_epochs_on_a_step_grid_stay_inside_the_fit(horizon, end) -> None:
    table = Linear(start="1ep", end=end, every="5st").timetable(horizon)
    assert table.events[-1].position < horizon.length


@pytest.mark.parametrize("horizon", [FitLength(None, 100, 10), FitLength(100, 100, 10)])
def test_epochs_beyond_the_last_step_are_refused(horizon) -> None:
    with pytest.raises(ValueError, match="at='50ep' lies beyond the fit"):
        OneShot("50ep").timetable(horizon)


@pytest.mark.parametrize("value", [1e36, 2e38])
def test_large_finite_gradients_are_observed(value) -> None:
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    pruner = Pruner(model, 0.5, criterion=Gradient(), schedule=None)
    pruner.observe({"weight": torch.full((1, 4), value * 10, dtype=torch.float64)})
    assert pruner.left_out == 0


@pytest.mark.parametrize("fraction", [1.5, -0.5, math.nan])
def test_fractions_are_shares(fraction) -> None:
    pruner = Pruner(nn.Linear(4, 4), 0.5, schedule=None)
    with pytest.raises(ValueError, match="fraction="):
        pruner.prune(fraction)


def test_shares_cannot_be_changed_from_outside() -> None:
    shares = {"20%": 0.5, "50%": 1.0}
    schedule = Steps(shares)
    shares["50%"] = 0.1
    assert schedule(1.0) == 1.0
    assert schedule(0.6) == 1.0


def test_a_score_of_minus_infinity_brings_nothing_back() -> None:
    class Signed(Criterion):
        def score(self, group: UnitGroup, statistics: Statistics) -> torch.Tensor:
            return group.weights[0]

    model = linears([[-9.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    pruner = Pruner(model, 2 / 6, criterion=Signed(), schedule=None)
    pruner.prune(0.5)
    model[0].weight.data[0, 3:5] = -math.inf
    with pytest.raises(ValueError, match="finite"):
        pruner.prune(1.0)
    assert pruner.masks["0.weight"].tolist() == [[False, True, True, True, True, True]]
