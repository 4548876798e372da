"""Targets in parameters and multiply-adds, widths in multiples, and what each layer keeps at least."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_by_coupling import ALL, IMAGES, flat, head, plain, residual
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import (
    Channels,
    Global,
    Magnitude,
    PerLayer,
    Pruner,
    Random,
    Threshold,
    Unstructured,
    compact,
)
from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import remove_lowest, remove_to_cost
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.budgets import Axis, Budget, Term
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice


def params(model: nn.Module, example: Tensor) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


COUNTS = {"params": params, "macs": macs}
BUDGETS = pytest.mark.parametrize("budget", ["params", "macs"])


def wide() -> nn.Module:
    """Enough channels for a budget to be met closely."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1, groups=48),
        nn.Conv2d(48, 64, 1),
        nn.ReLU(),
        head(64),
    )


@ALL
@BUDGETS
def test_what_coupling_saves_is_counted_to_the_last_one(
    make: Any, example: Tensor, sizes: list[int], budget: str
) -> None:
    model = make()
    units = Channels().units(model, example)
    generator = torch.Generator().manual_seed(0)
    kept = {group.name: torch.rand(group.size, generator=generator) < 0.6 for group in units.groups}
    masks = {}
    for group in units.groups:
        kept[group.name][0] = True
        for part in group.masked:
            mask = masks.setdefault(part.name, torch.ones_like(part.weight, dtype=torch.bool))
            mask &= part.spread(kept[group.name])
    smaller = compact(model, masks, example)
    assert units.budgets[budget].total == COUNTS[budget](model, example)
    assert units.budgets[budget].cost(kept) == pytest.approx(COUNTS[budget](smaller, example), rel=1e-12)


@BUDGETS
@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_a_budget_is_met(budget: str, target: float) -> None:
    model = wide()
    pruner = Pruner(
        model,
        target,
        structure=Channels(),
        selector=Global(budget=budget),
        criterion=Random(),
        schedule=None,
        example=IMAGES,
    )
    for fraction in (0.5, 1.0):
        pruner.prune(fraction)
        smaller = compact(model, pruner.masks, IMAGES)
        left = COUNTS[budget](smaller, IMAGES) / COUNTS[budget](model, IMAGES)
        assert left == pytest.approx(1 - fraction * target, abs=0.01)


@BUDGETS
def test_single_weights_meet_a_budget_of_the_whole_network(budget: str) -> None:
    model = wide()
    pruner = Pruner(
        model, 0.5, structure=Unstructured(), selector=Global(budget=budget), schedule=None, example=IMAGES
    )
    pruner.prune(1.0)
    if budget == "params":
        gone = sum(int((~mask).sum()) for mask in pruner.masks.values())
        assert gone == round(0.5 * params(model, IMAGES))
    else:
        # multiply-adds of each layer, worked out by hand
        positions = {"0.weight": 64, "3.weight": 64, "4.weight": 64, "6.2.weight": 1}
        total = sum(positions[name] * mask.numel() for name, mask in pruner.masks.items())
        left = sum(positions[name] * int(mask.sum()) for name, mask in pruner.masks.items())
        assert 2 * total == macs(model, IMAGES)
        assert abs(left - total / 2) <= 64


def test_a_budget_out_of_reach_says_what_is_reachable_and_what_is_frozen() -> None:
    model = flat()
    with pytest.raises(ValueError, match=r"target=0\.99 of all macs is out of reach: 0\.\d+ are"):
        Pruner(
            model,
            0.99,
            structure=Channels(exclude="0"),
            selector=Global(budget="macs"),
            schedule=None,
            example=IMAGES,
        )
    with pytest.raises(
        ValueError, match=r"0\.weight, 0: exclude names it; .*: is the network's output"
    ) as error:
        Pruner(
            model,
            0.9,
            structure=Channels(exclude="0"),
            selector=Global("params"),
            schedule=None,
            example=IMAGES,
        )
    assert "out of reach: 0.7698 are" in str(error.value)


@pytest.mark.parametrize("width", [5, 7, 11, 13])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_the_bound_of_a_budget_out_of_reach_is_in_reach(budget: str, width: int) -> None:
    def pruner(target: float) -> Pruner:
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3))
        parts: dict[str, Any] = {"structure": Channels(), "selector": Global(budget=budget), "schedule": None}
        return Pruner(model, target, example=torch.zeros(1, 8), **parts)

    with pytest.raises(ValueError, match="out of reach") as error:
        pruner(0.999)
    reachable = pruner(float(str(error.value).split("out of reach: ")[1].split(" are")[0]))
    reachable.prune(1.0)
    kept = {name: int(mask.any(1).sum()) for name, mask in reachable.masks.items() if mask.ndim > 1}
    assert kept == {"0.weight": 1, "2.weight": 1, "3.weight": 3}


@pytest.mark.parametrize(
    "arguments", [{"budget": "flops"}, {"budget": None}, {"normalize": "l1"}, {"normalize": True}]
)
def test_other_words_are_refused(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name}=.* must be one of"):
        Global(**arguments)


def test_a_cost_needs_a_budget_to_count_in() -> None:
    with pytest.raises(ValueError, match=r"normalize='cost' needs budget='params' or budget='macs'"):
        Global(normalize="cost")


def test_a_dense_network_costs_all() -> None:
    line = Axis(4, 1, (("a", torch.tensor([0, 1, 1])),))
    budget = Budget([Term(8, (line, line)), Term(3, ())])
    kept = {"a": torch.tensor([True, True])}
    assert budget.cost(kept) == budget.total == 11
    assert budget.cost({"a": torch.tensor([True, False])}) == 8 * 0.5 * 0.5 + 3
    assert budget.within([]).cost({}) == 11


# --- widths


@pytest.mark.parametrize("selector", [Global(), PerLayer(), Global("macs"), Threshold(quantile=0.6)])
def test_widths_are_multiples(selector: Any) -> None:
    target = None if isinstance(selector, Threshold) else 0.5
    model = wide()
    structure = Channels(round_to=8)
    pruner = Pruner(model, target, structure=structure, selector=selector, schedule=None, example=IMAGES)
    for fraction in (0.3, 0.6, 1.0):
        pruner.prune(fraction)
        for group in pruner.groups:
            part = group.slices[0]
            assert int((part.sum(pruner.masks[part.name]) > 0).sum()) % 8 == 0
    smaller = compact(model, pruner.masks, IMAGES)
    assert smaller[0].out_channels + smaller[4].out_channels < 48 + 64
    assert smaller[0].out_channels % 8 == smaller[4].out_channels % 8 == 0


class Grouped(nn.Module):
    """A grouped convolution between others, of 48 channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 48, 3), nn.Conv2d(48, 48, 3, groups=groups)
        self.last = nn.Conv2d(48, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.grouped(self.stem(images).relu()).relu())


def widths(groups: int, target: float = 0.5, **limits: Any) -> tuple[int, int]:
    """How many channels of 48 the two layers keep."""
    torch.manual_seed(0)
    model, structure = Grouped(groups), Channels(**limits)
    pruner = Pruner(model, target, structure=structure, selector=PerLayer(), schedule=None, example=IMAGES)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, IMAGES)
    return smaller.stem.out_channels, smaller.grouped.out_channels


# a unit is as many channels as there are groups
@pytest.mark.parametrize(
    ("groups", "round_to", "kept"), [(1, 8, 24), (4, 8, 24), (6, 8, 24), (16, 8, 16), (6, 4, 24), (4, 32, 32)]
)
def test_multiples_are_of_channels_where_a_unit_is_several(groups: int, round_to: int, kept: int) -> None:
    assert widths(groups, round_to=round_to) == (kept, kept)


@pytest.mark.parametrize(("groups", "minimum", "kept"), [(1, 20, 20), (6, 20, 24), (6, 24, 24), (6, 0.3, 18)])
def test_the_least_is_of_channels_where_a_unit_is_several(groups: int, minimum: float, kept: int) -> None:
    assert widths(groups, 0.99, minimum=minimum) == (kept, kept)


def test_a_layer_without_such_a_multiple_stays_whole_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), Grouped(16).grouped, nn.ReLU(), nn.Conv2d(48, 16, 1))
    model.append(nn.Conv2d(16, 2, 1))
    structure = Channels(round_to=5)
    pruner = Pruner(model, 0.5, structure=structure, selector=PerLayer(), schedule=None, example=IMAGES)
    reason = "keeps all: no smaller number is a multiple of round_to=5"
    same = {name for name, why in pruner.frozen.items() if why == reason}
    assert same == {"0", "0.weight", "2", "2.weight"}
    pruner.prune(1.0)
    assert compact(model, pruner.masks, IMAGES)[4].out_channels == 10


@pytest.mark.parametrize(("round_to", "heads"), [(1, 3), (8, 3), (16, 4)])
def test_multiples_of_attention_are_of_its_width(round_to: int, heads: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 48), nn.Linear(48, 2)
            self.attention = nn.MultiheadAttention(48, 6, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            embedded = self.first(tokens)
            return self.last(self.attention(embedded, embedded, embedded)[0])

    torch.manual_seed(0)
    model, tokens = Attention(), torch.randn(2, 5, 3)
    structure = Channels(round_to=round_to)
    pruner = Pruner(model, 0.5, structure=structure, selector=PerLayer(), schedule=None, example=tokens)
    pruner.prune(1.0)
    assert compact(model, pruner.masks, tokens).attention.num_heads == heads


@pytest.mark.parametrize(("minimum", "least"), [(5, [5, 5]), (0.3, [3, 2]), (7, [7, 6])])
def test_each_layer_keeps_its_least(minimum: float, least: list[int]) -> None:
    structure = Channels(minimum=minimum)
    pruner = Pruner(residual(), 0.99, structure=structure, schedule=None, example=IMAGES)
    pruner.prune(1.0)
    assert [int((g.slices[0].sum(pruner.masks[g.slices[0].name]) > 0).sum()) for g in pruner.groups] == least
    assert pruner.protected == {group.name for group in pruner.groups}


def test_a_least_that_leaves_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ValueError, match="no unit can go: stem at least 8 of 8, one at least 6 of 6 must stay"):
        Pruner(residual(), 0.99, structure=Channels(minimum=100), schedule=None, example=IMAGES)


@pytest.mark.parametrize(
    "arguments",
    [
        {"round_to": 0},
        {"round_to": 1.5},
        {"round_to": True},
        {"minimum": 0},
        {"minimum": 1.5},
        {"minimum": "2"},
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be"):
        Channels(**arguments)


class Given(Criterion):
    """The weights themselves."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        return group.weights[0]


def candidates(scores: list[list[int]], multiple: int, minimum: int) -> list[Candidates]:
    found = []
    for number, row in enumerate(scores):
        weight = torch.tensor(row, dtype=torch.float32)
        group = UnitGroup(
            f"{number}", (AxisSlice(f"{number}", weight, dim=0),), minimum=minimum, multiple=multiple
        )
        kept = torch.ones(len(row), dtype=torch.bool)
        found.append(Candidates(group, kept, Given(), Statistics.zeros((), kept, torch.float32), torch.float32))
    return found


SCORES = st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=20), min_size=1, max_size=5)


@given(SCORES, st.integers(1, 6), st.integers(1, 4), st.floats(0, 1))
def test_any_number_removed_leaves_widths_that_may_be(
    scores: list[list[int]], multiple: int, minimum: int, share: float
) -> None:
    found = candidates(scores, multiple, minimum)
    count = round(share * sum(map(len, scores)))
    remove_lowest(found, count)
    for each, row in zip(found, scores, strict=True):
        width = int(each.kept.sum())
        assert width == len(row) or (width % multiple == 0 and width >= minimum)
        assert width >= 1
        gone = [value for value, stays in zip(row, each.kept.tolist(), strict=True) if not stays]
        left = [value for value, stays in zip(row, each.kept.tolist(), strict=True) if stays]
        assert not gone or max(gone) <= min(left)
    if multiple == 1:
        possible = sum(max(0, len(row) - minimum) for row in scores)
        assert sum(int((~each.kept).sum()) for each in found) == min(count, possible)


FEW_SCORES = st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=8), min_size=1, max_size=4)


@given(FEW_SCORES, st.lists(st.integers(1, 50), min_size=4, max_size=4), st.floats(0.05, 1))
def test_a_cost_is_met_as_nearly_as_any_threshold_would(
    scores: list[list[int]], prices: list[int], goal: float
) -> None:
    def cost(found: list[Candidates]) -> float:
        left = sum(price * int(each.kept.sum()) for each, price in zip(found, prices, strict=False))
        return left / sum(price * len(row) for row, price in zip(scores, prices, strict=False))

    found = candidates(scores, 1, 1)
    remove_to_cost(found, lambda: cost(found), goal)
    best = []
    for count in range(sum(map(len, scores)) - len(scores) + 1):
        other = candidates(scores, 1, 1)
        remove_lowest(other, count)
        best.append(abs(cost(other) - goal))
    assert abs(cost(found) - goal) <= min(best) + 1e-9


def test_normalised_scores_compare_across_layers() -> None:
    weights = {"0": torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "2": torch.tensor([[10.0] * 4, [90.0] * 4])}
    removed = {}
    for normalize in (None, "mean", "l2"):
        model = nn.Sequential(
            nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Linear(2, 1)
        )
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight.clone()
        pruner = Pruner(
            model,
            0.5,
            criterion=Magnitude(),
            structure=Channels(),
            selector=Global(normalize=normalize),
            schedule=None,
            example=torch.ones(1, 1),
        )
        pruner.prune(1.0)
        removed[normalize] = [int((~pruner.masks[name].any(1)).sum()) for name in ("0.weight", "2.weight")]
    # of the sums 1 to 4 and 40 and 360; over their means .4 to 1.6, and .2 and 1.8
    assert removed == {None: [3, 0], "mean": [2, 1], "l2": [2, 1]}


@pytest.mark.parametrize(("normalize", "kept"), [("mean", [4, 1]), ("max", [3, 2])])
def test_scores_over_the_mean_or_the_largest(normalize: Literal["mean", "max"], kept: list[int]) -> None:
    # 3 3 3 12 and 1 2.75: over their means 4 / 7 and 8 / 15, over the largest 1 / 4 and 4 / 11
    found = candidates([[3.0, 3.0, 3.0, 12.0], [1.0, 2.75]], 1, 1)
    Global(normalize=normalize).select(found, 1 / 6, lambda budget: 1.0)
    assert [int(each.kept.sum()) for each in found] == kept


@pytest.mark.parametrize(("normalize", "kept"), [(None, [1, 2]), ("cost", [2, 1])])
def test_what_saves_much_goes_before_what_scores_a_little_less(
    normalize: Literal["cost"] | None, kept: list[int]
) -> None:
    model = nn.Sequential(
        nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)
    )
    model.get_submodule("0").weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    model.get_submodule("2").weight.data = torch.tensor([[1.125] * 4, [90.0] * 4])
    pruner = Pruner(
        model,
        0.6,
        criterion=Magnitude(p=1),
        structure=Channels(),
        selector=Global(budget="params", normalize=normalize),
        schedule=None,
        example=torch.ones(1, 1),
    )
    pruner.prune(1.0)
    # scores 1, 2, 3, 4 at 1 + 2 weights each, and 4.5 and 360 at 4 + 1: 3 / 3 > 4.5 / 5. Both leave 6 of 15.
    assert [int(pruner.masks[name].any(1).sum()) for name in ("0.weight", "2.weight")] == kept


def test_what_scores_less_than_nothing_goes_first_where_it_saves_much() -> None:
    found = candidates([[-1.0, 1.0], [-1.0, 1.0]], 1, 1)
    for each, price in zip(found, (0.1, 0.2), strict=True):
        each.weigh(price)
    assert [each.scores().tolist() for each in found] == [
        pytest.approx([-0.1, 10.0]),
        pytest.approx([-0.2, 5.0]),
    ]


def test_what_saves_nothing_goes_last() -> None:
    model = flat()
    model.get_submodule("3").unused = nn.Linear(4, 4)  # no pass comes here
    pruner = Pruner(
        model,
        0.5,
        structure=Unstructured(),
        selector=Global(budget="macs", normalize="cost"),
        schedule=None,
        example=IMAGES,
    )
    pruner.prune(1.0)
    assert pruner.masks["3.unused.weight"].all()


def test_few_weights_that_cost_much_meet_a_budget_in_any_layout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Conv2d(2, 3, 1))
    kept = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pruner = Pruner(
            copy.deepcopy(model).to(memory_format=memory_format),
            0.53,
            structure=Unstructured(),
            selector=Global(budget="macs"),
            schedule=None,
            example=torch.zeros(1, 2, 8, 8),
        )
        pruner.prune(1.0)
        kept.append([mask.tolist() for mask in pruner.masks.values()])
    assert kept[0] == kept[1]


def test_the_plain_network_is_counted_by_hand() -> None:
    units = Channels().units(plain(), IMAGES)
    assert units.budgets["macs"].total == 2 * (64 * 9 * 3 * 8 + 64 * 9 * 8 * 6 + 6 * 4)
