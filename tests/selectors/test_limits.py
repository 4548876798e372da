"""The largest share that one layer may lose: ``Global(most=...)``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import Channels, Global, Losses, ParticleFilter, Pruner, Selector


def small_and_large() -> nn.Module:
    """100 small weights, 300 large ones and 29 in between, all different."""
    model = nn.Sequential(*(nn.Linear(1, size, bias=False) for size in (100, 300, 29)))
    with torch.no_grad():
        for layer, low in zip(model, (1, 1000, 500), strict=True):
            layer.weight.copy_(torch.arange(low, low + layer.out_features).view(-1, 1))
    return model


def pruned_by(selector: Selector, target: Any = 0.5, **parts: Any) -> list[int]:
    pruner = Pruner(small_and_large(), target, selector=selector, schedule=None, **parts)
    for fraction in (0.5, 1.0):
        pruner.prune(fraction, losses=Losses(lambda model, batch: batch, [torch.zeros(())]))
    assert all(
        (mask.flatten().int().diff() >= 0).all() for mask in pruner.masks.values()
    )  # the lowest are gone
    return [int((~mask).sum()) for mask in pruner.masks.values()]


@pytest.mark.parametrize(
    ("most", "target", "gone"),
    [
        (0.9, 0.5, [90, 98, 26]),  # 26.1
        (0.29, 0.2, [29, 49, 8]),  # 8.41, and 29 of 100 as it is written
        (0.5, 0.4, [50, 108, 14]),
        (1.0, 0.5, [99, 87, 28]),
    ],
)
def test_no_layer_loses_more_than_the_most_and_the_target_is_met(
    most: float, target: float, gone: list[int]
) -> None:
    assert sum(gone) == round(target * 429)
    assert pruned_by(Global(most=most), target) == gone
    assert pruned_by(Global("params", most=most), target) == gone
    assert pruned_by(ParticleFilter(Global(most=most), population=1, rounds=1), target) == gone


def test_the_most_holds_for_each_pattern_and_is_refused_where_it_puts_a_target_out_of_reach() -> None:
    assert pruned_by(Global(most=0.5), {"0": 0.5, "*": 0.5}) == [50, 150, 14]
    with pytest.raises(ValueError, match=r"target=0\.6 of all units is out of reach: 0\.4988 are"):
        pruned_by(Global(most=0.5), 0.6)
    assert sum(pruned_by(Global(most=0.5))) == 214  # of 214.5
    with pytest.raises(ValueError, match=r"target=0\.6 of all params is out of reach: 0\.4988 are"):
        pruned_by(Global("params", most=0.5), 0.6)
    with pytest.raises(ValueError, match=r"for '2', target=0\.6 of all units is out of reach: 0\.4827 are"):
        pruned_by(Global(most=0.5), {"2": 0.6})


def test_a_layer_at_its_limit_is_told() -> None:
    pruner = Pruner(small_and_large(), 0.4, selector=Global(most=0.5), schedule=None)
    pruner.prune(1.0)
    assert pruner.protected == {"0.weight", "2.weight"}


def test_of_equal_scores_the_earlier_stay_at_the_limit() -> None:
    model = nn.Sequential(nn.Linear(1, 8, bias=False), nn.Linear(1, 8, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].weight.fill_(2)
    pruner = Pruner(model, 0.5, selector=Global(most=0.75), schedule=None)
    pruner.prune(1.0)
    assert [mask.flatten().int().tolist() for mask in pruner.masks.values()] == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0],
    ]


def test_a_lower_limit_brings_nothing_back() -> None:
    model = small_and_large()
    first = Pruner(model, 0.5, selector=Global(), schedule=None)
    first.prune(1.0)
    second = Pruner(model, 0.55, selector=Global(most=0.6), schedule=None)
    second.load_state_dict(first.state_dict())
    second.prune(1.0)
    assert [int((~mask).sum()) for mask in second.masks.values()] == [99, 109, 28]


def test_channels_at_their_limit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    parts: dict[str, Any] = {
        "structure": Channels(),
        "selector": Global(most=0.25),
        "example": torch.ones(1, 4),
    }
    pruner = Pruner(model, 0.2, schedule=None, **parts)
    pruner.prune(1.0)
    assert [int((~mask.any(1)).sum()) for mask in pruner.masks.values() if mask.ndim > 1] == [2, 6, 0]


def test_the_default_is_not_printed_as_states_of_earlier_versions_have_it() -> None:
    assert repr(Global()) == "Global(budget='units', normalize=None, cost_weight=0.0)"
    assert repr(Global(most=0.5)) == "Global(budget='units', normalize=None, cost_weight=0.0, most=0.5)"
