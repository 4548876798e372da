"""Global(budget="latency"): which units go by a table made by hand, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Blocks, Channels, Global, LatencyTable, ParticleFilter, Pruner, Unstructured
from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.channels.latency.table import LayerTimes
from lightning_prune.selectors import timing

ROWS = torch.linspace(-1, 1, 10).view(2, 5)


def network() -> nn.Sequential:
    """Two hidden layers of 4 and 8 units, with scores like their numbers; the first has the best."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for name, each in model.named_parameters():
        nn.init.constant_(each, 0.0 if name.endswith("bias") else 0.125)
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(9.0, 13)[:, None].expand(4, 5))
        model[2].weight.copy_(torch.arange(1.0, 9)[:, None].expand(8, 4))
    return model


def steps(group: str, *seconds: float) -> LayerTimes:
    """A layer with these times at each of its widths, from 1 on."""
    knots = tuple((width + 1) / len(seconds) for width in range(len(seconds)))
    return LayerTimes(group, ({group: 1.0},), ((1.0,), knots), (seconds,))


TABLE = LatencyTable(
    "cpu: elsewhere",
    "float32",
    2,
    ((2, 5),),
    {"0": 4, "2": 8},
    dense=51.0,
    factor=1.0,
    rest=11.0,
    error=0.01,
    spread=0.02,
    # of the second layer, four units take one step
    layers=(steps("0", 5.0, 10, 15, 20), steps("2", 8.0, 8, 8, 8, 20, 20, 20, 20)),
)


def pruner(target: Any, model: nn.Module | None = None, table: Any = TABLE, **settings: Any) -> Pruner:
    """One of channels, which has pruned to the target."""
    structure = settings.pop("structure", Channels())
    selector = Global("latency", table=table, **settings)
    found = Pruner(
        model or network(), target, structure=structure, selector=selector, schedule=None, example=ROWS
    )
    found.prune(1.0)
    return found


def widths(found: Pruner) -> tuple[int, ...]:
    return tuple(int(each.slices[0].kept(found.masks[each.slices[0].name]).sum()) for each in found.groups)


def seconds(first: int, second: int) -> float:
    return 11 + 5 * first + (8 if second <= 4 else 20)


def test_the_groups_are_those_of_the_table() -> None:
    assert [(group.name, group.size) for group in pruner(0.3).groups] == [("0", 4), ("2", 8)]


# the lowest scores are those of the second layer, whose units cost nothing but at the step from 4 to 5
@pytest.mark.parametrize(
    ("target", "kept"),
    [(0.23, (4, 4)), (0.34, (3, 4)), (0.43, (2, 4)), (0.52, (1, 4)), (0.1, (3, 8)), (0.196, (2, 8))],
)
def test_units_go_until_the_time_is_met_and_none_that_saves_nothing(
    target: float, kept: tuple[int, int]
) -> None:
    found = pruner(target)
    assert widths(found) == kept
    reached = found.latency_target
    assert reached is not None
    assert reached.expected == pytest.approx(seconds(*kept) / 51)
    # those of a layer that go score lowest
    first, second = (each.slices[0].kept(found.masks[each.slices[0].name]).tolist() for each in found.groups)
    assert first == sorted(first)
    assert second == sorted(second)
    # no other widths are nearer
    apart = {pair: abs(seconds(*pair) - 51 * (1 - target)) for pair in product(range(1, 5), range(1, 9))}
    assert apart[kept] == pytest.approx(min(apart.values()))


def smooth(model: nn.Module, rates: tuple[float, float], **settings: Any) -> tuple[int, ...]:
    """The widths of a network whose layers take these times a unit, in percent of the whole."""
    layers = (
        steps("0", *(rates[0] * width for width in range(1, 5))),
        steps("2", *(rates[1] * width for width in range(1, 9))),
    )
    rest = 100 - 4 * rates[0] - 8 * rates[1]
    return widths(pruner(table=replace(TABLE, layers=layers, rest=rest), model=model, **settings))


@pytest.mark.parametrize("rates", [(1.0, 9.0), (16.0, 1.0), (5.0, 5.0)])
def test_scores_are_divided_by_the_time_that_a_unit_saves(rates: tuple[float, float]) -> None:
    """An oracle orders all units by score over time, and takes the nearest of all beginnings of that order."""
    model = network()
    with torch.no_grad():  # scores of 1, 2, 3, 4 times ten, and of 1 to 8 times four
        model[0].weight.copy_(torch.arange(2.0, 10, 2)[:, None].expand(4, 5))
    scores = [(10 * unit / rates[0], 0) for unit in range(1, 5)] + [
        (4 * unit / rates[1], 1) for unit in range(1, 9)
    ]
    # of equal scores the earlier unit stays
    order = [layer for _, layer in sorted(scores, key=lambda each: (each[0], -each[1]))]
    ends = [(4 - order[:gone].count(0), 8 - order[:gone].count(1)) for gone in range(12)]
    for first, second in [end for end in ends if min(end) > 0][1::3]:
        target = ((4 - first) * rates[0] + (8 - second) * rates[1]) / 100
        found = smooth(network_like(model), rates, target=target, normalize="cost")
        assert found == (first, second)


def network_like(model: nn.Module) -> nn.Sequential:
    found = network()
    found.load_state_dict(model.state_dict())
    return found


def test_widths_are_multiples_and_layers_keep_their_share() -> None:
    assert widths(pruner(0.43, structure=Channels(round_to=2))) == (2, 4)
    assert widths(pruner(0.196, structure=Channels(round_to=2))) == (2, 8)
    assert widths(pruner(0.43, most=0.5)) == (2, 4)
    assert smooth(network(), (5.0, 5.0), target=0.3, structure=Channels(round_to=3)) == (3, 3)


def test_all_pairs_of_widths_cost_what_the_table_says() -> None:
    found = pruner(0.3)
    budget = LatencyBudget(TABLE, {group.name for group in found.groups})
    for first, second in product(range(1, 5), range(1, 9)):
        kept = {"0": torch.arange(4) < first, "2": torch.arange(8) < second}
        assert budget.cost(kept) == pytest.approx(seconds(first, second))


def test_each_pattern_has_the_time_of_the_layers_that_it_shortens() -> None:
    found = pruner({"0.*": 0.5, "2.*": 0.6})
    assert widths(found) == (2, 4)
    assert found.latency_target is None


def test_a_target_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(ValueError, match=r"target=0.6 of the measured time is out of reach: 0.5294 are"):
        pruner(0.6)
    with pytest.raises(ValueError, match=r"target=0.5 of the measured time is out of reach: 0.4313 are"):
        pruner(0.5, most=0.5)


def test_a_file_is_read_for_the_network(tmp_path: Path) -> None:
    TABLE.save(path := tmp_path / "table.json")
    assert widths(pruner(0.44, table=str(path))) == widths(pruner(0.44, table=path)) == (2, 4)


def test_an_excluded_layer_counts_in_full() -> None:
    found = pruner(0.23, structure=Channels(exclude="0"))
    assert [group.name for group in found.groups] == ["2"]
    assert widths(found) == (4,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"groups": {"0": 4, "2": 9}}, r"another network.*: 2 has 8 units and there 9\. It has 0, 2"),
        ({"groups": {"0": 4}, "layers": TABLE.layers[:1]}, r"another network.*: 2 has 8 units and there none"),
        ({"inputs": ((2, 7),)}, r"inputs of shapes 2x7, and this network's are 2x5"),
    ],
)
def test_a_table_of_another_network_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pruner(0.3, table=replace(TABLE, **changed))


def test_a_table_that_is_too_noisy_is_told() -> None:
    with pytest.warns(UserWarning, match=r"^budget='latency': timing was too noisy"):
        pruner(0.3, table=replace(TABLE, error=0.2))


@pytest.mark.parametrize("structure", [Unstructured(), Blocks(2, 2)])
def test_zeros_save_no_time(structure: Any) -> None:
    with pytest.raises(ValueError, match=r"zeros alone save no time.*: take Channels\(\) or Heads\(\)"):
        pruner(0.3, structure=structure)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Global(batch=1), "batch=1 is for budget='latency', and budget is 'units'"),
        (
            lambda: Global("macs", table="t.json"),
            "table='t.json' is for budget='latency', and budget is 'macs'",
        ),
        (lambda: Global("latency", batch=0), "batch=0 must be a whole number of at least 1"),
        (lambda: Global("latency", batch=True), "batch=True must be a whole number of at least 1"),
        (lambda: Global("latency", table=""), "table='' must be the path of a file, or a LatencyTable"),
        (lambda: Global("latency", table=3), "table=3 must be the path of a file, or a LatencyTable"),
        (lambda: Global("latency", batch=1, table=TABLE), "batch=1 must be left out or be 2"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


def test_another_batch_size_than_that_of_the_file_is_refused(tmp_path: Path) -> None:
    TABLE.save(path := tmp_path / "table.json")
    with pytest.raises(
        ValueError, match=r"batch=1 must be left out or be 2, that of table=<latency table of cpu"
    ):
        pruner(0.3, table=path, batch=1)


def test_a_search_goes_by_the_time_of_its_selector() -> None:
    selector = ParticleFilter(Global("latency", table=TABLE), population=2, rounds=1, batches=1)
    found = Pruner(network(), 0.44, structure=Channels(), selector=selector, schedule=None, example=ROWS)
    assert found.latency_table == TABLE
    assert selector.with_table(replace(TABLE, dense=1.0)).selector.table.dense == 1.0  # type: ignore[attr-defined]


def test_only_the_first_process_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a group of processes, of which this is the only one here, it sends what it has, or its error."""
    calls: list[int] = []

    def once(model: nn.Module, groups: Any, example: Tensor, batch: int) -> LatencyTable:
        calls.append(batch)
        return TABLE

    monkeypatch.setattr(timing, "measure_times", once)
    if torch.distributed.is_initialized():  # as a Trainer of several processes leaves it
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = Pruner(
            network(),
            0.3,
            structure=Channels(),
            selector=Global("latency", batch=2),
            schedule=None,
            example=ROWS,
        )
        assert found.latency_table == TABLE
        with pytest.raises(FileNotFoundError):
            pruner(0.3, table=tmp_path / "none.json")
    finally:
        torch.distributed.destroy_process_group()
    assert calls == [2]
