"""The measurement of a table: which widths, which layers they shorten, and whose time is whose."""

from __future__ import annotations

from itertools import combinations, count, pairwise, product

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, Heads, LatencyTable, Unstructured, measure_latency
from lightning_prune.channels.latency import measurement, module_calls
from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.channels.latency.design import colours_of, level_of, widths_of
from lightning_prune.channels.latency.layer_axes import call_axes
from lightning_prune.channels.latency.layer_times import Run, layer_times
from lightning_prune.channels.latency.module_calls import CallTimes
from lightning_prune.core.probes import ForwardProbe

IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


class Residual(nn.Module):
    """A block whose own code adds, of 8 channels outside and 6 inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.relu(self.stem(images))
        return self.head(self.relu(inner + self.block(inner)).mean((2, 3)))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure at three widths, in as few rounds as may be."""
    monkeypatch.setattr(measurement, "SECONDS", 0.0)


@pytest.mark.parametrize("levels", [3, 5, 7])
def test_each_pair_of_levels_of_two_colours_occurs_once(levels: int) -> None:
    runs = [[level_of(run, colour, levels) for colour in range(levels + 1)] for run in range(levels**2)]
    for one, other in combinations(range(levels + 1), 2):
        assert sorted((run[one], run[other]) for run in runs) == sorted(product(range(levels), repeat=2))


def test_layers_see_two_colours_and_joined_groups_one() -> None:
    chain = [((name, 1.0),) for name in "abcd"]
    layers = [*pairwise(chain), (chain[0],), ((("b", 0.5), ("d", 0.5)), chain[0])]
    colours = colours_of(layers, "abcde", 7)
    assert colours["b"] == colours["d"]
    assert all(colours[one] != colours[other] for one, other in ("ab", "bc", "cd"))
    assert set(colours) == set("abcde")


def test_widths_run_from_the_least_to_all() -> None:
    groups = {group.size: group for group in Channels(round_to=2, minimum=3).units(Residual(), IMAGES).groups}
    assert widths_of(groups[8], 3) == [4, 6, 8]
    assert widths_of(groups[6], 5) == [4, 4, 6, 6, 6]
    (wide,) = (
        Channels().units(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), torch.ones(2, 4)).groups
    )
    assert widths_of(wide, 7) == [2, 14, 27, 39, 52, 63, 64]


def test_the_code_of_a_module_is_charged_without_that_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock strikes once whenever it is read, so that each module takes as long as it is read in it."""
    ticks = count()
    monkeypatch.setattr(module_calls, "compute_time", lambda: float(next(ticks)))
    with (times := CallTimes()).following(model := Residual()):
        model(IMAGES)
    # each call of another module in the code of one lets a further second pass in it
    assert times.seconds[("stem", 0)] == times.seconds[("relu", 0)] == times.seconds[("relu", 1)] == 1
    assert times.seconds[("block", 0)] == 4
    assert times.seconds[("", 0)] == 6
    assert sum(times.seconds.values()) == next(ticks) - 1
    assert times.caller[("block.0", 0)] == ("block", 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def axes_of(model: nn.Module, example: Tensor, structure: Channels) -> dict[tuple[str, int], object]:
    groups = structure.units(model, example).groups
    cuts = (
        (
            group.name,
            (group.size - 1) / group.size,
            measurement._narrow(model, groups, {group.name: group.size - 1}),
        )
        for group in groups
    )
    return dict(call_axes(model, ForwardProbe(example), cuts))


def test_axes_are_the_dimensions_that_units_shorten() -> None:
    outer, inner = (("stem", 1.0),), (("block.0", 1.0),)
    found = axes_of(Residual(), IMAGES, Channels())
    assert found[("stem", 0)] == found[("relu", 0)] == found[("relu", 1)] == found[("head", 0)] == (outer,)
    assert set(found[("block.0", 0)]) == set(found[("block.2", 0)]) == {outer, inner}  # type: ignore[arg-type]
    assert found[("block.1", 0)] == (inner,)


class Joined(nn.Module):
    """Two layers of 4 and 12 channels are read as one tensor, with the 4 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 12), nn.Linear(20, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.cat([self.one(rows), rows, self.other(rows)], 1))


def test_groups_that_are_joined_shorten_one_axis_by_their_shares() -> None:
    found = axes_of(Joined(), torch.ones(2, 4), Channels())
    assert found[("head", 0)] == ((("one", 0.2), ("other", 0.6)),)


def test_times_of_modules_that_not_all_networks_call_count_for_their_caller() -> None:
    axis = (("a", 1.0),)
    axes = {("", 0): (), ("norm", 0): (axis,), ("norm.scale", 0): (axis,)}
    caller = {("", 0): None, ("norm", 0): ("", 0), ("norm.scale", 0): ("norm", 0)}
    runs = [
        Run({"a": 4}, 0.5, 0.0, {("", 0): 0.1, ("norm", 0): 0.2, ("norm.scale", 0): 0.2}, caller, 2.0),
        Run({"a": 8}, 1.0, 0.0, {("", 0): 0.1, ("norm", 0): 0.9}, caller, 2.0),
    ]
    root, norm = layer_times(runs, axes, {"a": 8}, {"a": 0})
    assert (root.layer, root.axes, root.seconds) == ("", (), ((0.2,),))
    assert norm.knots == ((1.0,), (0.5, 1.0))
    assert norm.seconds[0] == pytest.approx((0.8, 1.8))


def test_a_network_is_measured(quickly: None) -> None:
    model = Residual()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    table = measure_latency(model, IMAGES, batch=3)
    assert table.groups == {"stem": 8, "block.0": 6}
    assert (table.batch, table.inputs, table.dtype) == (3, ((3, 3, 6, 6),), "float32")
    assert {layer.layer for layer in table.layers} == {name for name, _ in model.named_modules()}
    convolution = next(layer for layer in table.layers if layer.layer == "block.0")
    assert sorted(convolution.knots) == [pytest.approx((0.25, 0.625, 1.0)), pytest.approx((2 / 6, 4 / 6, 1.0))]
    budget = LatencyBudget(table, table.groups)
    assert budget.total == pytest.approx(table.dense)
    assert budget.seconds({"stem": 2, "block.0": 2}) <= budget.total
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert model.training


class Attention(nn.Module):
    """Fused operations of torch, which a cut takes apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 8, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


@pytest.mark.parametrize("structure", [Channels(), Heads()])
def test_attention_is_measured(quickly: None, structure: Channels | Heads) -> None:
    table = measure_latency(Attention(), torch.linspace(-1, 1, 40).view(2, 5, 4), structure)
    budget = LatencyBudget(table, table.groups)
    assert budget.total == pytest.approx(table.dense)
    assert 4 in table.groups.values()
    assert isinstance(table, LatencyTable)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch=0 must be a whole number of at least 1"):
        measure_latency(Residual(), IMAGES, batch=0)
    with pytest.raises(ValueError, match=r"^structure=Unstructured\(.*\) has units that save no time"):
        measure_latency(Residual(), IMAGES, Unstructured())


class Pairs(nn.Module):
    """Takes the difference of the two examples of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, rows: Tensor) -> Tensor:
        one, other = self.layers(rows).view(-1, 2, 2).unbind(1)
        return one - other


def test_a_batch_size_that_the_network_does_not_take_is_named(quickly: None) -> None:
    with pytest.raises(ValueError, match=r"^batch=3: Pairs does not run on a batch of that size"):
        measure_latency(Pairs(), torch.ones(2, 4), batch=3)
    assert measure_latency(Pairs(), torch.linspace(-1, 1, 8).view(2, 4), batch=4).batch == 4
