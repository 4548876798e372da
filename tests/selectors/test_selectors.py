"""Selectors: exact counts, exact masks, ties, and no layer emptied."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_prune import (
    LAMP,
    Criterion,
    Global,
    Gradient,
    Magnitude,
    NofM,
    PerLayer,
    Pruner,
    Selector,
    Threshold,
)
from lightning_prune.statistics.sums import Statistics
from lightning_prune.structures.base import Structure
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice


class Signed(Criterion):
    """The weight itself, so that a test can give any score."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        return group.weights[0]


class Rows(Structure):
    """One group a Linear, of its output rows."""

    def units(self, model: nn.Module, example: object = None) -> Units:
        groups = [
            UnitGroup(name, (AxisSlice(f"{name}.weight", module.weight, dim=0),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        return Units(tuple(groups), {})


def lowest(groups: list[list[float]], count: int) -> list[list[bool]]:
    """What stays when the lowest go, spelled out: of equals the earlier stays, and no group is emptied."""
    units = [(group, index) for group, scores in enumerate(groups) for index in range(len(scores))]
    count = min(count, len(units) - len(groups))
    safe: set[tuple[int, int]] = set()
    while True:
        exposed = sorted(
            (unit for unit in units if unit not in safe),
            key=lambda unit: (groups[unit[0]][unit[1]], -unit[0], -unit[1]),
        )
        gone = set(exposed[:count])
        kept = [[(group, index) not in gone for index in range(len(s))] for group, s in enumerate(groups)]
        emptied = [group for group, stays in enumerate(kept) if not any(stays)]
        if not emptied:
            return kept
        safe |= {(group, groups[group].index(max(groups[group]))) for group in emptied}


def tie_free_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives all weights of a model different absolute values, and random signs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    total = sum(weight.numel() for weight in weights)
    values = torch.randperm(total, generator=generator) + 1.0
    values *= torch.randint(0, 2, (total,), generator=generator) * 2 - 1
    start = 0
    for weight in weights:
        weight.data.copy_(values[start : start + weight.numel()].view(weight.shape))
        start += weight.numel()
    return model


def convolutions() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(20, 7))
    return tie_free_(model)


def linears(*weights: list[list[float]]) -> nn.Module:
    layers = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data = torch.tensor(weight)
        layers.append(layer)
    return nn.Sequential(*layers)


def pruned(model: nn.Module, target: float | None, selector: Selector, fraction: float = 1.0) -> Pruner:
    pruner = Pruner(model, target, selector=selector, schedule=None)
    pruner.prune(fraction)
    return pruner


def removed(pruner: Pruner) -> list[int]:
    return [int((~mask).sum()) for mask in pruner.masks.values()]


def kept(pruner: Pruner) -> list[list[bool]]:
    return [mask.flatten().tolist() for mask in pruner.masks.values()]


@pytest.mark.parametrize("target", [0.001, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_global_is_exact_and_agrees_with_torch(target: float, layout: torch.memory_format) -> None:
    model = convolutions()
    oracle = copy.deepcopy(model)
    layers = [layer for layer in oracle if hasattr(layer, "weight")]
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=prune.L1Unstructured, amount=target
    )
    pruner = pruned(model.to(memory_format=layout), target, Global())
    assert sum(removed(pruner)) == round(target * 716)
    for mask, layer in zip(pruner.masks.values(), layers, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())
    for name, parameter in model.named_parameters():
        if name in pruner.masks:
            assert torch.equal(parameter != 0, pruner.masks[name])


@pytest.mark.parametrize("target", [0.01, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_per_layer_is_exact_and_agrees_with_torch(target: float, layout: torch.memory_format) -> None:
    model = convolutions()
    oracle = copy.deepcopy(model)
    layers = [layer for layer in oracle if hasattr(layer, "weight")]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=target)
    pruner = pruned(model.to(memory_format=layout), target, PerLayer())
    assert removed(pruner) == [round(target * size) for size in (216, 360, 140)]
    for mask, layer in zip(pruner.masks.values(), layers, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("selector", [Global(), PerLayer()])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_equals_the_earlier_in_index_order_stays(selector: Selector, layout: torch.memory_format) -> None:
    model = convolutions()
    generator = torch.Generator().manual_seed(0)
    for layer in (model[0], model[2], model[4]):
        layer.weight.data = torch.randint(1, 4, layer.weight.shape, generator=generator).float()
    model = model.to(memory_format=layout)
    scores = [layer.weight.flatten().tolist() for layer in (model[0], model[2], model[4])]
    for target in (0.2, 0.5, 0.8):
        pruner = pruned(copy.deepcopy(model), target, selector)
        if isinstance(selector, Global):
            assert kept(pruner) == lowest(scores, round(target * 716))
        else:
            assert kept(pruner) == [lowest([layer], round(target * len(layer)))[0] for layer in scores]


def test_of_equals_the_earlier_layer_stays() -> None:
    pruner = pruned(linears([[1.0, 1.0]], [[1.0, 2.0]], [[1.0, 1.0, 1.0]]), 3 / 7, Global())
    assert kept(pruner) == [[True, True], [False, True], [True, False, False]]


@st.composite
def networks(draw: st.DrawFn) -> list[list[list[float]]]:
    """Small weight matrices with few values, so that ties abound."""
    values = st.integers(1, draw(st.sampled_from([1, 2, 5, 1000]))).map(float)
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    return [draw(st.lists(st.lists(values, min_size=b, max_size=b), min_size=a, max_size=a)) for a, b in shapes]


@given(networks(), st.floats(0.01, 0.99), st.lists(st.floats(0.05, 1), max_size=2).map(sorted))
def test_global_removes_what_a_sort_would(
    weights: list[list[list[float]]], target: float, fractions: list[float]
) -> None:
    scores = [[value for row in weight for value in row] for weight in weights]
    total = sum(map(len, scores))
    assume(round(target * total) > 0 and total > len(weights))
    pruner = Pruner(linears(*weights), target, selector=Global(), schedule=None)
    stays = [[True] * len(layer) for layer in scores]
    for fraction in [*fractions, 1.0]:
        count = round(fraction * target * total)
        if count > total - sum(map(sum, stays)):
            stays = lowest(
                [
                    [score if stay else -math.inf for score, stay in zip(*pair, strict=True)]
                    for pair in zip(scores, stays, strict=True)
                ],
                count,
            )
        pruner.prune(fraction)
        assert kept(pruner) == stays
        assert sum(removed(pruner)) == min(count, total - len(weights))
        assert all(any(layer) for layer in stays)


@given(networks(), st.floats(0.01, 0.99))
def test_per_layer_removes_what_a_sort_would(weights: list[list[list[float]]], target: float) -> None:
    scores = [[value for row in weight for value in row] for weight in weights]
    total = sum(map(len, scores))
    assume(round(target * total) > 0 and total > len(weights))
    pruner = pruned(linears(*weights), target, PerLayer())
    assert removed(pruner) == [min(round(target * len(layer)), len(layer) - 1) for layer in scores]
    assert kept(pruner) == [lowest([layer], round(target * len(layer)))[0] for layer in scores]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.integers(0, 2**31),
)
def test_counts_are_exact_whatever_the_shapes(shapes: list[tuple[int, int]], target: float, seed: int) -> None:
    model = tie_free_(nn.Sequential(*(nn.Linear(a, b) for a, b in shapes)), seed)
    sizes = [a * b for a, b in shapes]
    assume(round(target * sum(sizes)) > 0 and sum(sizes) > len(sizes))
    everywhere = pruned(copy.deepcopy(model), target, Global())
    assert sum(removed(everywhere)) == min(round(target * sum(sizes)), sum(sizes) - len(sizes))
    each = pruned(copy.deepcopy(model), target, PerLayer())
    assert removed(each) == [min(round(target * size), size - 1) for size in sizes]


def test_no_layer_is_emptied_and_others_give_more() -> None:
    small = [[0.1, 0.3, 0.2], [0.05, 0.15, 0.25]]
    large = [[5.0, 6.0, 7.0], [8.0, 9.0, 4.0]]
    pruner = pruned(linears(small, large), 0.75, Global())  # of the 9 lowest, 6 are in the first layer
    assert removed(pruner) == [5, 4]
    assert kept(pruner) == [
        [False, True, False, False, False, False],
        [False, False, False, True, True, False],
    ]
    assert pruner.protected == {"0.weight"}


def test_the_last_unit_of_each_layer_is_out_of_reach() -> None:
    pruner = pruned(linears([[1.0, 2.0]], [[4.0, 3.0]], [[5.0]]), 0.99, Global())
    assert kept(pruner) == [[False, True], [True, False], [True]]
    assert "0.weight" in pruner.protected


def test_per_layer_keeps_one_unit_of_a_tiny_layer() -> None:
    pruner = pruned(linears([[1.0]], [[4.0, 3.0, 1.0, 2.0]]), 0.5, PerLayer())
    assert kept(pruner) == [[True], [True, True, False, False]]


def test_nothing_is_protected_where_nothing_would_be_emptied() -> None:
    assert pruned(convolutions(), 0.5, Global()).protected == set()


@pytest.mark.parametrize("selector", [Global(), PerLayer(), NofM(1, 4)])
def test_masks_only_grow_while_the_weights_move(selector: Selector) -> None:
    model = tie_free_(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    sizes = [96, 96]
    pruner = Pruner(model, 0.75, selector=selector, schedule=None)
    generator = torch.Generator().manual_seed(0)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for fraction in (0.2, 0.2, 0.5, 0.3, 0.8, 1.0, 0.1):
        already = removed(pruner)
        pruner.prune(fraction)
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
            before[name] = mask.clone()
        if isinstance(selector, PerLayer):
            aim = [round(fraction * 0.75 * size) for size in sizes]
            assert removed(pruner) == [max(pair) for pair in zip(already, aim, strict=True)]
        else:
            assert sum(removed(pruner)) == max(sum(already), round(fraction * 0.75 * 192))
        for name, parameter in model.named_parameters():
            if name in pruner.masks:
                assert torch.equal(parameter[~pruner.masks[name]], torch.zeros(int((~before[name]).sum())))
                parameter.data = torch.randn(parameter.shape, generator=generator)


def test_scores_may_be_negative_and_of_any_size() -> None:
    most = torch.finfo(torch.float32).max
    model = linears([[-most, most, 3.0, -5.0]], [[most, -2.0, -most, -0.0]])
    pruner = Pruner(model, 0.5, criterion=Signed(), schedule=None)
    pruner.prune(0.5)
    assert kept(pruner) == [[False, True, True, True], [True, True, False, True]]
    pruner.prune(1.0)
    assert kept(pruner) == [[False, True, True, False], [True, False, False, True]]
    assert [layer.weight.tolist() for layer in model] == [[[0, most, 3, 0]], [[most, 0, 0, 0]]]


def test_layers_of_different_precision_compete_in_the_finer() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(4, 1, dtype=torch.float64))
    model[0].weight.data = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    model[1].weight.data = torch.tensor([[1 + 2**-40, 1 - 2**-40, 9.0, 11.0]], dtype=torch.float64)
    assert kept(pruned(model, 2 / 8, Global())) == [[False, True, True, True], [True, False, True, True]]


@pytest.mark.parametrize(
    ("selector", "target"),
    [(Global(), 0.5), (PerLayer(), 0.5), (Threshold(value=0.5), None), (NofM(2, 4), None)],
)
@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused_by_layer(
    selector: Selector, target: float | None, score: float
) -> None:
    model = tie_free_(nn.Sequential(nn.Linear(4, 4)))
    model[0].weight.data[2, 3] = score
    pruner = Pruner(model, target, selector=selector)
    with pytest.raises(ValueError, match=r"^Magnitude\(p=1\.0\) .* '0\.weight'"):
        pruner.step(1.0)
    assert removed(pruner) == [0]


@pytest.mark.parametrize("selector", [Global(), PerLayer()])
@pytest.mark.parametrize("target", [None, 0, 1, 0.0, 1.0, -0.5, 1.5, 50, True, "0.5", math.nan])
def test_targets_are_shares(selector: Selector, target: float | None) -> None:
    with pytest.raises(ValueError, match="must be a number above 0 and below 1") as error:
        selector.resolve(target)
    assert str(error.value).startswith(f"target={target!r} ")


def test_a_target_that_removes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target=0\.1 of 4 units removes none"):
        Pruner(nn.Linear(2, 2), 0.1)


# --- N of M


def blocks(mask: Tensor, dim: int, m: int) -> Tensor:
    """How many stay of every ``m`` along a dimension."""
    return mask.movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1)


LAYERS = [
    (lambda: nn.Linear(16, 6), 1),
    (lambda: nn.Conv1d(8, 6, 3), 1),
    (lambda: nn.Conv2d(8, 6, 3), 1),
    (lambda: nn.Conv2d(8, 6, (1, 3)).to(memory_format=torch.channels_last), 1),
    (lambda: nn.Conv2d(16, 6, 3, groups=2), 1),
    (lambda: nn.ConvTranspose2d(8, 6, 3), 0),
    (lambda: nn.ConvTranspose2d(8, 6, 3).to(memory_format=torch.channels_last), 0),
]


@pytest.mark.parametrize(("layer", "dim"), LAYERS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2)])
def test_n_of_every_m_inputs_stay_and_they_are_the_largest(layer: object, dim: int, n: int, m: int) -> None:
    model = tie_free_(layer())  # type: ignore[operator]
    size = model.weight.abs().detach().movedim(dim, -1).unflatten(-1, (-1, m))
    best = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.topk(n).indices, value=True)
    pruner = pruned(model, None, NofM(n, m))
    mask = pruner.masks["weight"]
    assert (blocks(mask, dim, m) == n).all()
    assert torch.equal(mask.movedim(dim, -1).unflatten(-1, (-1, m)), best)
    assert removed(pruner) == [mask.numel() - mask.numel() * n // m]
    assert torch.equal(model.weight != 0, mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_on_the_way_the_lowest_of_what_the_pattern_lets_go_are_gone(n: int, m: int) -> None:
    model = tie_free_(nn.Sequential(nn.Linear(16, 6), nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(8, 2, 3)))
    dims = [1, 1, 0]
    whole = pruned(copy.deepcopy(model), None, NofM(n, m))
    total = 96 + 288 + 144
    loose = torch.cat(
        [layer.weight.abs()[~mask] for layer, mask in zip(model, whole.masks.values(), strict=True)]
    )
    for fraction in (0.1, 0.37, 0.5, 0.99):
        pruner = pruned(copy.deepcopy(model), None, NofM(n, m), fraction)
        count = round(fraction * (1 - n / m) * total)
        assert sum(removed(pruner)) == count
        level = loose.sort().values[count - 1]
        for layer, dim, mask, last in zip(
            model, dims, pruner.masks.values(), whole.masks.values(), strict=True
        ):
            assert (blocks(mask, dim, m) >= n).all()
            assert torch.equal(mask, last | (layer.weight.abs() > level))


def test_of_equal_inputs_the_earlier_stay() -> None:
    pruner = pruned(linears([[1.0] * 8, [2.0, 1.0, 2.0, 2.0] * 2]), None, NofM(2, 4))
    assert kept(pruner) == [[True, True, False, False] * 2 + [True, False, True, False] * 2]


def test_a_target_may_repeat_the_pattern() -> None:
    assert removed(pruned(tie_free_(nn.Linear(8, 4)), 0.5, NofM(2, 4))) == [16]
    assert removed(pruned(tie_free_(nn.Linear(9, 4)), 2 / 3, NofM(1, 3))) == [24]


@pytest.mark.parametrize("target", [0.4, 0.75, 0, 1, True])
def test_another_target_contradicts_the_pattern(target: float) -> None:
    with pytest.raises(ValueError, match=r"must be left out or be 0\.5 for NofM\(n=2, m=4\)") as error:
        Pruner(nn.Linear(8, 8), target, selector=NofM(2, 4))
    assert str(error.value).startswith(f"target={target!r} ")


def test_layers_that_the_pattern_does_not_divide_stay_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(6, 4), nn.Linear(8, 4))
    tie_free_(model)
    before = copy.deepcopy(model)
    pruner = pruned(model, None, NofM(2, 4))
    assert list(pruner.masks) == ["3.weight"]
    assert pruner.frozen == {
        "0.weight": "3 inputs are no multiple of m=4",
        "1.weight": "1 inputs are no multiple of m=4",
        "2.weight": "6 inputs are no multiple of m=4",
    }
    assert all(torch.equal(model[index].weight, before[index].weight) for index in range(3))


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"with NofM\(n=2, m=4\) can prune no layer\. weight: 6 inputs are no"):
        Pruner(nn.Linear(6, 4), selector=NofM(2, 4))


def test_a_pattern_needs_single_weights() -> None:
    with pytest.raises(ValueError, match=r"NofM\(n=2, m=4\) needs single weights of a layer with inputs"):
        Pruner(nn.Sequential(nn.Linear(8, 8)), structure=Rows(), selector=NofM(2, 4))


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (0, 4, "n=0 must be above 0 and below m=4"),
        (4, 4, "n=4 must be above 0 and below m=4"),
        (-1, 4, "n=-1 must be above 0 and below m=4"),
        (2.0, 4, "n=2.0 must be an integer"),
        (2, "4", "m='4' must be an integer"),
        (True, 4, "n=True must be an integer"),
    ],
)
def test_patterns_are_two_whole_numbers(n: int, m: int, message: str) -> None:
    with pytest.raises(ValueError, match="=") as error:
        NofM(n, m)
    assert str(error.value).startswith(message)


# --- thresholds

TWO = [[[0.1, -0.2, 0.3, -0.4]], [[1.0, -2.0, 3.0, -10.0]]]


@pytest.mark.parametrize(
    ("selector", "fraction", "expected"),
    [
        (Threshold(value=0.3), 1.0, [[False, False, False, True], [True, True, True, True]]),
        (Threshold(value=0.2), 1.0, [[False, False, True, True], [True, True, True, True]]),
        (Threshold(value=0.4), 0.5, [[False, False, True, True], [True, True, True, True]]),
        (Threshold(value=3.0), 1.0, [[False, False, False, True], [False, False, False, True]]),
        (Threshold(value=100.0), 1.0, [[False, False, False, True], [False, False, False, True]]),
        (Threshold(value=0.05), 1.0, [[True] * 4, [True] * 4]),
        (Threshold(quantile=0.5), 1.0, [[False, False, True, True], [False, False, True, True]]),
        (Threshold(quantile=0.5), 0.5, [[False, True, True, True], [False, True, True, True]]),
        (Threshold(quantile=0.99), 1.0, [[False, False, False, True], [False, False, False, True]]),
        # means .25 and 4
        (Threshold(mean=1.0), 1.0, [[False, False, True, True], [False, False, False, True]]),
        (Threshold(mean=0.5), 1.0, [[False, True, True, True], [False, False, True, True]]),
        (Threshold(mean=0.5), 0.5, [[True, True, True, True], [False, True, True, True]]),
        # deviations of the weights .311 and 5.715, of their sizes .129 and 4.082
        (Threshold(std=1.0), 1.0, [[False, False, False, True], [False, False, False, True]]),
        (Threshold(std=0.5), 1.0, [[False, True, True, True], [False, False, True, True]]),
        (Threshold(std=1.0), 0.5, [[False, True, True, True], [False, False, True, True]]),
    ],
)
def test_thresholds_by_hand(selector: Threshold, fraction: float, expected: list[list[bool]]) -> None:
    assert kept(pruned(linears(*TWO), None, selector, fraction)) == expected


def test_han_measures_the_weights_not_their_sizes() -> None:
    weights = [2.0, -2.0, 3.0, -3.0]
    assert statistics.stdev(weights) > 2 > statistics.stdev(map(abs, weights))
    assert kept(pruned(linears([weights]), None, Threshold(std=1.0))) == [[False, False, True, True]]


def test_other_criteria_measure_their_scores() -> None:
    model = linears([[100.0, -200.0, 300.0, 50.0]])
    pruner = Pruner(model, criterion=Gradient(), selector=Threshold(std=0.5), schedule=None)
    pruner.observe({"0.weight": torch.tensor([[1.0, -2.0, 3.0, 10.0]])})
    assert 2 < 0.5 * statistics.stdev([1, 2, 3, 10]) < 3
    pruner.prune(1.0)
    assert kept(pruner) == [[False, False, True, True]]


def test_units_of_many_weights_measure_their_scores() -> None:
    model = linears([[2.0, 2.0], [-4.0, 2.0], [20.0, 1.0]])
    pruner = Pruner(model, structure=Rows(), selector=Threshold(std=0.5), schedule=None)
    assert 4 < 0.5 * statistics.stdev([4, 6, 21]) < 6
    pruner.prune(1.0)
    assert kept(pruner) == [[False, False, True, True, True, True]]


def test_mean_levels_are_taken_anew_from_what_is_there() -> None:
    model = linears([[1.0, 2.0, 3.0, 10.0]])
    pruner = Pruner(model, selector=Threshold(mean=0.5), schedule=None)
    pruner.prune(1.0)
    assert kept(pruner) == [[False, False, True, True]]  # up to 2, half of the mean of four
    pruner.prune(1.0)
    assert kept(pruner) == [[False, False, False, True]]  # up to 3.25, half of the mean of two


def test_a_threshold_above_all_keeps_the_best_of_each_layer() -> None:
    pruner = pruned(linears([[1.0, 3.0, 3.0, 2.0]], [[200.0, 1.0]]), None, Threshold(value=100.0))
    assert kept(pruner) == [[False, True, False, False], [True, False]]
    assert pruner.protected == {"0.weight"}


@pytest.mark.parametrize("quantile", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_quantiles_are_exact_in_each_layer(quantile: float) -> None:
    pruner = pruned(convolutions(), None, Threshold(quantile=quantile))
    assert removed(pruner) == [round(quantile * size) for size in (216, 360, 140)]


@pytest.mark.parametrize("target", [0.5, 0, 1.0])
def test_thresholds_take_no_target(target: float) -> None:
    with pytest.raises(ValueError, match="must be None for Threshold") as error:
        Pruner(nn.Linear(4, 4), target, selector=Threshold(value=1.0))
    assert str(error.value).startswith(f"target={target!r} ")


@pytest.mark.parametrize("arguments", [{}, {"value": 1.0, "std": 1.0}, {"mean": 1.0, "quantile": 0.5}])
def test_a_threshold_is_one_thing(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give exactly one of value, quantile, mean and std"):
        Threshold(**arguments)


@pytest.mark.parametrize(
    ("name", "number", "limit"),
    [
        ("value", 0, "inf"),
        ("value", -1.0, "inf"),
        ("value", math.inf, "inf"),
        ("value", math.nan, "inf"),
        ("value", "1", "inf"),
        ("mean", 0.0, "inf"),
        ("std", True, "inf"),
        ("quantile", 0, "1.0"),
        ("quantile", 1, "1.0"),
        ("quantile", 1.5, "1.0"),
    ],
)
def test_thresholds_are_positive_numbers(name: str, number: float, limit: str) -> None:
    with pytest.raises(ValueError, match="must be a number above 0") as error:
        Threshold(**{name: number})
    assert str(error.value) == f"{name}={number!r} must be a number above 0 and below {limit}."


@pytest.mark.parametrize("criterion", [Magnitude(), LAMP()])
def test_deterministic_algorithms_will_do(criterion: Criterion) -> None:
    pruners = []
    for deterministic in (False, True):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(deterministic)
        try:
            pruners.append(Pruner(nn.Linear(64, 64), 0.7, criterion=criterion, schedule=None))
            pruners[-1].prune(0.5)
            pruners[-1].prune(1.0)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(*(pruner.masks["weight"] for pruner in pruners))
