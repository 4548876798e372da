"""Targets by pattern: each pattern's units are selected on their own, with every selector, also in a fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback
from lit import Lit, fit, seeded
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_prune import (
    Channels,
    Global,
    Guard,
    Losses,
    NofM,
    OneShot,
    ParticleFilter,
    PerLayer,
    Pruner,
    PruningCallback,
    Reconstruct,
    Rewind,
    Selector,
    Steps,
    Threshold,
    compact,
)
from lightning_prune.selectors.base import Costs
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import remove_lowest

INPUTS = torch.linspace(-1, 1, 40).view(4, 10)
BOTH = {"encoder*": 0.3, "decoder*": 0.6}


class Coder(nn.Module):
    """600 weights in two layers of the encoder, 600 in two of the decoder, 100 in the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU())
        self.head = nn.Linear(10, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(inputs)))


def pruned(target: Any, model: nn.Module | None = None, fraction: float = 1.0, **parts: Any) -> Pruner:
    pruner = Pruner(model or Coder(), target, schedule=None, **parts)
    pruner.prune(fraction)
    return pruner


def gone(pruner: Pruner, prefix: str) -> int:
    return sum(int((~mask).sum()) for name, mask in pruner.masks.items() if name.startswith(prefix))


# --- which units


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_each_pattern_is_pruned_as_torch_prunes_its_layers_alone(fraction: float) -> None:
    model = Coder()
    twin = copy.deepcopy(model)
    pruner = pruned(BOTH, model, fraction)
    for part, target in ((twin.encoder, 0.3), (twin.decoder, 0.6)):
        layers = [(part[0], "weight"), (part[2], "weight")]
        amount = round(fraction * target * 600)
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
    expected = {name.removesuffix("_mask"): mask.bool() for name, mask in twin.named_buffers()}
    assert pruner.masks.keys() == expected.keys()
    assert all(torch.equal(mask, expected[name]) for name, mask in pruner.masks.items())
    assert (gone(pruner, "encoder"), gone(pruner, "decoder")) == (180 * fraction, 360 * fraction)
    assert pruner.frozen == {"head.weight": "no pattern of target covers it"}


def test_the_first_pattern_that_matches_counts_and_a_star_takes_the_rest() -> None:
    pruner = pruned({"encoder.2": 0.9, "encoder*": 0.5, "*": 0.25}, selector=PerLayer())
    assert {name: gone(pruner, name) for name in pruner.masks} == {
        "encoder.0.weight": 100,
        "encoder.2.weight": 360,
        "decoder.0.weight": 100,
        "decoder.2.weight": 50,
        "head.weight": 25,
    }
    assert pruner.frozen == {}


def test_one_pattern_for_all_is_one_target() -> None:
    one, other = pruned({"*": 0.7}), pruned(0.7)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())


def test_a_tied_weight_is_found_by_each_of_its_names() -> None:
    model = Coder()
    model.decoder[0].weight = model.encoder[2].weight
    pruner = pruned({"decoder*": 0.5}, model, selector=PerLayer())
    assert {name: gone(pruner, name) for name in pruner.masks} == {
        "encoder.2.weight": 200,
        "decoder.2.weight": 100,
    }


def test_a_selector_of_a_users_own_needs_no_change() -> None:
    class Halves(Selector):
        """Removes the lowest of all that it is given."""

        def select(self, candidates: Any, fraction: float, costs: Costs) -> None:
            assert all(isinstance(each, Candidates) for each in candidates)
            remove_lowest(candidates, int(fraction * sum(each.size for each in candidates)))

    pruner = pruned(BOTH, selector=Halves())
    assert (gone(pruner, "encoder"), gone(pruner, "decoder")) == (180, 360)


def test_particles_are_searched_for_each_pattern() -> None:
    losses = Losses(lambda model, batch: model(batch).square().mean(), [INPUTS])
    pruner = Pruner(Coder(), BOTH, selector=ParticleFilter(population=3, rounds=2, batches=1), schedule=None)
    pruner.prune(1.0, losses=losses)
    assert (gone(pruner, "encoder"), gone(pruner, "decoder")) == (180, 360)


# --- channels and budgets


def test_channels_belong_to_the_pattern_of_a_weight_that_makes_them() -> None:
    pruner = pruned({"encoder.2*": 0.25, "decoder*": 0.5}, structure=Channels(), example=INPUTS)
    units = {
        name: int((~mask.any(1)).sum()) for name, mask in pruner.masks.items() if mask.ndim > 1
    }  # the readers lose columns, not rows
    assert units == {"encoder.2.weight": 5, "decoder.0.weight": units["decoder.0.weight"]} | {
        "decoder.2.weight": 15 - units["decoder.0.weight"],
        "head.weight": 0,
    }
    assert pruner.frozen["encoder.0"] == "no pattern of target covers it"


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_budget_is_that_of_the_layers_that_the_units_are_in(budget: Any) -> None:
    """Counted by cutting out the units of one pattern alone."""
    model = Coder().double()
    parts: dict[str, Any] = {"structure": Channels(), "selector": Global(budget=budget)}
    pruner = pruned(BOTH, copy.deepcopy(model), example=INPUTS.double(), **parts)
    for pattern, layers, target in (
        ("encoder", ("encoder.0", "encoder.2", "decoder.0"), 0.3),
        ("decoder", ("decoder.0", "decoder.2", "head"), 0.6),
    ):
        masks = {name: torch.ones_like(mask) for name, mask in pruner.masks.items()}
        for group in pruner.groups:
            if group.name.startswith(pattern):
                kept = group.slices[0].kept(pruner.masks[group.slices[0].name])
                for part in group.masked:
                    masks[part.name] &= part.spread(kept)
        smaller = compact(model, masks, INPUTS.double())

        def cost(network: nn.Module, layers: tuple[str, ...] = layers) -> int:
            found = [network.get_submodule(name) for name in layers]
            biases = sum(each.bias.numel() for each in found) if budget == "params" else 0
            return sum(each.weight.numel() for each in found) + biases

        # the biases of layers that only read the units are not theirs
        constant = sum(model.get_submodule(name).bias.numel() for name in layers[2:]) * (budget == "params")
        left = (cost(smaller) - constant) / (cost(model) - constant)
        assert left == pytest.approx(1 - target, abs=0.03)


def test_a_budget_out_of_reach_names_the_pattern() -> None:
    with pytest.raises(ValueError, match=r"for 'decoder\*', target=0\.99 of all params is out .*: 0\.6657"):
        Pruner(
            Coder(),
            {"encoder*": 0.3, "decoder*": 0.99},
            structure=Channels(minimum=0.4),
            selector=Global(budget="params"),
            example=INPUTS,
        )


def test_a_pattern_of_units_that_cost_nothing_is_refused() -> None:
    model = Coder()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"for 'spare', target=0\.5 is a share of no macs"):
        Pruner(model, {"encoder*": 0.3, "spare": 0.5}, selector=Global(budget="macs"), example=INPUTS)


# --- what is wrong


@pytest.mark.parametrize(
    ("target", "selector", "message"),
    [
        ({"encodr*": 0.3}, Global(), r"target='encodr\*' matches no parameter or module; .*'encoder'"),
        ({"*": 0.3, "encoder*": 0.1}, Global(), r"target\['encoder\*'\]=0\.1 .*: a pattern before it takes"),
        ({"*bias": 0.3}, Global(), r"target\['\*bias'\]=0\.3 has no units to remove: it matches no weight"),
        ({"encoder*": 1.5}, Global(), r"for 'encoder\*', target=1\.5 must be a number above 0 and below 1"),
        ({"encoder*": "much"}, PerLayer(), r"for 'encoder\*', target='much' must be a number above 0"),
        ({"encoder*": 1e-6}, Global(), r"for 'encoder\*', target=1e-06 of 600 units removes none"),
        ({"encoder*": 0.5}, NofM(2, 4), r"target=\{'encoder\*': 0\.5\} must be left out or be 0\.5 for NofM"),
        ({"encoder*": 0.5}, Threshold(value=0.1), r"target=\{'encoder\*': 0\.5\} must be None for Threshold"),
        ({}, Global(), r"target=\{\} must be a number, or map patterns of names to numbers"),
        ({3: 0.5}, Global(), r"target=\{3: 0\.5\} must be a number, or map"),
    ],
)
def test_wrong_targets_are_refused(target: Any, selector: Selector, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruner(Coder(), target, selector=selector)


def test_a_pattern_of_frozen_units_says_why_they_are() -> None:
    with pytest.raises(ValueError, match=r"target\['head\*'\]=0\.5 has .*: .*is the network's output"):
        Pruner(Coder(), {"*coder*": 0.5, "head*": 0.5}, structure=Channels(), example=INPUTS)


# --- in a fit: 72, 4608 and 160 weights

SHARES = {"net.0*": 0.25, "net.4*": 0.5}


def removed(pruning: PruningCallback) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in pruning.masks.items()}


class Counts(Callback):
    """What is gone at the end of each epoch."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning, self.found = pruning, list[dict[str, int]]()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.found.append(removed(self.pruning))


def test_a_fit_reaches_each_target_along_one_curve(tmp_path: Path) -> None:
    pruning = PruningCallback(SHARES, schedule=Steps({"1ep": 0.5, "2ep": 1.0}))
    counts = Counts(pruning)
    fit(tmp_path, seeded(Lit), pruning, counts, max_epochs=3)
    assert counts.found == [
        {"net.0.weight": zeros[0], "net.4.weight": zeros[1]} for zeros in ((0, 0), (9, 1152), (18, 2304))
    ]
    assert pruning.report.frozen == {"net.6.weight": "no pattern of target covers it"}
    looked = pruning.plan(seeded(Lit))
    assert {layer.name: layer.size - layer.remaining for layer in looked.layers} == removed(pruning)
    assert looked.frozen == pruning.report.frozen


@pytest.mark.parametrize(
    "parts",
    [
        {"rewind": Rewind("0ep")},
        {"guard": Guard("acc", max_drop=1.0)},
        {"reconstruct": Reconstruct(batches=2, ridge=0.1)},
    ],
    ids=lambda parts: next(iter(parts)),
)
@pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data:UserWarning")
def test_what_follows_an_event_follows_it_here_too(tmp_path: Path, parts: dict[str, Any]) -> None:
    pruning = PruningCallback(SHARES, schedule=OneShot("2ep"), **parts)
    fit(tmp_path, seeded(Lit), pruning, num_sanity_val_steps=2)
    assert removed(pruning) == {"net.0.weight": 18, "net.4.weight": 2304}


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        # the sum and the largest of the targets stay
        ({"net.0*": 0.25, "net.4*": 0.5}, {"net.0*": 0.5, "net.4*": 0.25}, (36, 2304, 0)),
        ({"net.0*": 0.25, "net.4*": 0.5}, {"net.0*": 0.25, "net.6*": 0.5}, (18, 2304, 80)),
        ({"net.0*": 0.25, "net.4*": 0.75}, 0.5, (36, 3456, 80)),
        (0.5, {"net.6*": 0.5}, (None, None, 80)),
    ],
)
def test_targets_that_change_after_the_last_event_are_reached_and_bring_nothing_back(
    tmp_path: Path, before: Any, after: Any, counts: tuple[int | None, ...]
) -> None:
    model, path = seeded(Lit), tmp_path / "done.ckpt"
    first = PruningCallback(before, selector=PerLayer(), schedule=OneShot("1ep"))
    fit(tmp_path, model, first, max_epochs=2).save_checkpoint(path)
    once = removed(first)
    second = PruningCallback(after, selector=PerLayer(), schedule=OneShot("1ep"))
    fit(tmp_path, seeded(Lit), second, max_epochs=4, ckpt_path=path)
    for name, count in zip(("net.0.weight", "net.4.weight", "net.6.weight"), counts, strict=True):
        assert removed(second).get(name, 0) == (once[name] if count is None else count), name
        assert not (second.masks[name] & ~first.masks[name]).any() if name in first.masks else True
