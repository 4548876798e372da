"""Models with a part that cannot be followed: what include names is pruned, and what the rest reads stays."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import seed_everything
from lit import Lit, fit
from networks_by_coupling import TOKENS, Net
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    Channels,
    CompactionError,
    Global,
    OneShot,
    PerLayer,
    Pruner,
    PruningCallback,
    Unstructured,
    compact,
    load_compact,
)
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.core.probes import ForwardProbe

NAMED = Channels(include="backbone*")


def turns(values: list[float]) -> int:
    """A number that each change of the values changes, and that says how often something is done."""
    return random.Random(repr([round(value, 6) for value in values])).randrange(1000)


class Head(nn.Module):
    """Does something as often as its values say."""

    def __init__(self, width: int, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        scores = self.fc(features)
        return scores + torch.zeros(turns(scores.flatten().tolist()), 1).sum()


class Backbone(nn.Sequential):
    """Three layers."""

    def __init__(self, inward: int = 6) -> None:
        super().__init__(
            nn.Linear(inward, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6)
        )


def network(run: Callable[[Any, Tensor], Any] = lambda m, x: m.head(m.backbone(x)), **layers: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(run, **{"backbone": Backbone(), "head": Head(6)} | layers)


def pruned(model: nn.Module, structure: Any = NAMED, example: Any = TOKENS) -> Pruner:
    pruner = Pruner(model, 0.5, structure=structure, selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    return pruner


def sizes(model: nn.Module, example: Any = TOKENS, **options: Any) -> dict[str, int]:
    units = Channels(**{"include": "backbone*"} | options).units(model, example)
    return {group.name: group.size for group in units.groups}


def test_what_include_names_is_pruned_and_compacted() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"^Net runs other ops, .* Channels\(include=\.\.\.\) follows a part"):
        Channels().units(model, TOKENS)
    pruner = pruned(model)
    assert {group.name: group.size for group in pruner.groups} == {"backbone.0": 8, "backbone.2": 7}
    assert pruner.frozen["backbone.4.weight"] == "is the network's output"
    assert pruner.frozen["head.fc.weight"].startswith(
        "lies outside of what is followed alone (backbone): Net runs other ops, or"
    )
    smaller = compact(model.double(), pruner.masks, TOKENS.double())
    assert [smaller.backbone[place].out_features for place in (0, 2, 4)] == [4, 3, 6]
    torch.testing.assert_close(
        smaller.eval()(TOKENS.double()), model.eval()(TOKENS.double()), rtol=0, atol=1e-9
    )


def test_multiply_adds_of_the_rest_count() -> None:
    model = network()
    budget = NAMED.units(model, TOKENS).budgets["macs"]
    assert budget.total == 10 * (6 * 8 + 8 * 7 + 7 * 6 + 6 * 4)
    pruner = Pruner(model, 0.5, structure=NAMED, selector=Global(budget="macs"), schedule=None, example=TOKENS)
    pruner.prune(1.0)
    assert pruner.sparsity > 0.3


class Unlike(nn.Module):
    """Gives something else each time."""

    def forward(self, features: Tensor) -> Tensor:
        return features * int.from_bytes(os.urandom(4))


class Failing(Head):
    """Fails when its weights are others than they were."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.first = self.fc.weight.detach().clone()

    def forward(self, features: Tensor) -> Tensor:
        assert torch.equal(self.fc.weight.float(), self.first)
        return self.fc(features)


@pytest.mark.parametrize("make", [Unlike, lambda: Failing(6)], ids=["random", "fails"])
def test_whatever_the_rest_does_the_part_goes(make: Callable[[], nn.Module]) -> None:
    model = network(head=make())
    smaller = compact(model, pruned(model).masks, TOKENS)
    assert [smaller.backbone[place].out_features for place in (0, 2, 4)] == [4, 3, 6]


def test_several_parts_are_followed_and_parts_within_a_part_that_is_not() -> None:
    inner = Net(lambda m, x: m.head(m.body(x)) + x, body=Backbone(), head=Head(6, 6))
    model = network(lambda m, x: m.head(m.backbone(m.stem(x))), stem=inner, backbone=Backbone())
    wanted = ("backbone*", "stem*")
    units = Channels(include=wanted).units(model, TOKENS)
    assert units.parts == ("backbone", "stem.body")
    found = {group.name: group.size for group in units.groups}
    assert found == {"backbone.0": 8, "backbone.2": 7, "stem.body.0": 8, "stem.body.2": 7}


READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "function": lambda m, x: m.head(m.backbone(x)) + F.linear(x, m.backbone[0].weight).mean(),
    "list": lambda m, x: m.head(m.backbone(x)) + turns(m.backbone[0].weight.flatten().tolist()),
    "shape": lambda m, x: m.head(m.backbone(x)) + m.backbone[0].weight.shape[0],
    "memory": lambda m, x: m.head(m.backbone(x)) + m.backbone[0].weight.data.numpy().sum(),
    "argument": lambda m, x: m.head(m.backbone(x + 0 * m.backbone[0].weight.sum())),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_weights_that_the_rest_reads_stay(read: Callable[[Any, Tensor], Any]) -> None:
    model = network(read)
    assert sizes(model) == {"backbone.2": 7}
    reason = NAMED.units(model, TOKENS).frozen["backbone.0.weight"]
    assert reason == "is read by the rest of the model, which is not followed"


def test_weights_that_are_tied_to_the_rest_stay() -> None:
    model = network()
    model.head.copied = nn.Linear(6, 8)
    model.head.copied.weight = model.backbone[0].weight
    assert sizes(model) == {"backbone.2": 7}


def test_a_weight_that_is_given_to_the_part_stays() -> None:
    part = Net(lambda m, x: m.two(m.one(x[0]).relu()) * len(x[1]), one=nn.Linear(6, 8), two=nn.Linear(8, 6))
    model = network(lambda m, x: m.head(m.backbone((x, m.backbone.one.bias))), backbone=part)
    with pytest.raises(ValueError, match="finds nothing to prune"):
        sizes(model)


class Telling(Backbone):
    """Returns or keeps what the channels of its second layer are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept = how, None

    def forward(self, rows: Tensor) -> Any:
        hidden = self[1](self[0](rows))
        if self.how == "attribute":
            self.kept = hidden
        told = {"width": hidden.shape[-1], "values": hidden.mean((0, 1)).numpy(force=True)}
        features = self[4](self[3](self[2](hidden)))
        return (features, told[self.how]) if self.how in told else features


@pytest.mark.parametrize("how", ["attribute", "width", "values"])
def test_channels_of_which_the_rest_is_told_stay(how: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        found = m.backbone(x)
        features, told = found if isinstance(found, tuple) else (found, m.backbone.kept.mean())
        return m.head(features) + torch.as_tensor(told).sum()

    assert sizes(network(run, backbone=Telling(how))) == {"backbone.2": 7}


@pytest.mark.parametrize("aux", ["no pass", "second call", "training", "outside in training"])
def test_all_calls_are_followed_those_in_training_too(aux: str) -> None:
    def part(m: Any, x: Tensor) -> Tensor:
        hidden = m.one(x).relu()
        return m.two(hidden) + (m.again(hidden) if len(x) == 1 else 0)

    def run(m: Any, x: Tensor) -> Tensor:
        features = m.backbone(x)
        if aux == "second call" or (aux == "training" and m.training):
            features = features + m.backbone(x[:1]).mean()
        if aux == "outside in training" and m.training:
            features = features + m.backbone.again(m.backbone.one(x)).mean()
        return m.head(features)

    model = network(run, backbone=Net(part, one=nn.Linear(6, 8), two=nn.Linear(8, 6), again=nn.Linear(8, 6)))
    if aux in ("second call", "training"):
        assert sizes(model) == {"backbone.one": 8}
        assert {part.name for part in NAMED.units(model, TOKENS).groups[0].readers} == {
            "backbone.two.weight",
            "backbone.again.weight",
        }
    else:
        why = "may be read by backbone.again" if aux == "no pass" else "is read by the rest of the model"
        with pytest.raises(ValueError, match=f"finds nothing to prune.*{why}"):
            sizes(model)


def test_what_is_not_called_as_a_module_is_refused() -> None:
    model = network(lambda m, x: m.head(m.backbone.forward(x)))
    with pytest.raises(ValueError, match=r"Nor can .*: backbone: no pass on the example calls 'backbone'"):
        sizes(model)
    with pytest.raises(ValueError, match="include='bakbone' matches no parameter or module"):
        sizes(model, include="bakbone")
    with pytest.raises(ValueError, match=r"^Net cannot run on the example: RuntimeError"):
        sizes(network(), TOKENS[..., :2])


def test_masks_say_which_part_is_compacted() -> None:
    model = network()
    pruner = Pruner(model, 0.5, structure=Unstructured(), schedule=None)
    pruner.masks["backbone.0.weight"][[0, 2]] = False
    pruner.apply_()
    with torch.no_grad():
        model.backbone[0].bias[[0, 2]] = 0
    assert compact(model, pruner.masks, TOKENS).backbone[0].out_features == 6


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda m, x: m.head(m.backbone(x)) + sum(p.numel() for p in m.parameters()), "outputs change"),
        (lambda m, x: Unlike()(m.head(m.backbone(x)) + torch.ones(m.backbone[0].out_features // 2)), "Runtime"),
    ],
    ids=["outputs", "fails"],
)
def test_a_difference_that_only_the_whole_model_shows_is_found(run: Any, why: str) -> None:
    model = network()
    pruner = pruned(model)
    model.run = run
    with pytest.raises(CompactionError, match=f"cannot be cut: {why}"):
        compact_(model, pruner.masks, pruner.channel_groups, ForwardProbe(TOKENS), parts=pruner.parts)


class LitParts(Lit):
    """Digits, a backbone, and a head that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"backbone": Backbone(64), "head": Head(6, 10)}
        self.net = network(lambda m, x: m.head(m.backbone(x.flatten(1))), **layers)


def test_a_fit_prunes_resumes_compacts_and_saves(tmp_path: Path) -> None:
    def callback(target: float, at: str, **options: Any) -> PruningCallback:
        structure = Channels(include="net.backbone*")
        return PruningCallback(
            target, structure=structure, selector=PerLayer(), schedule=OneShot(at=at), **options
        )

    def widths(model: Any) -> list[int]:
        return [model.net.backbone[place].out_features for place in (0, 2, 4)]

    seed_everything(0, verbose=False)
    run = fit(tmp_path, LitParts(), callback(0.25, "3st"), max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    model = LitParts()
    run = fit(
        tmp_path, model, callback(0.5, "7st", compact=True), max_epochs=2, ckpt_path=tmp_path / "half.ckpt"
    )
    assert widths(model) == [4, 3, 6]
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_compact(tmp_path / "small.ckpt", LitParts())
    assert widths(loaded) == [4, 3, 6]
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
