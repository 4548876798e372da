"""What an analysis runs: how often, on which inputs, and when it is made anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, CompactionError, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.compaction.tracing import record_passes, trace_model
from lightning_prune.channels.compaction.trial_copies import TrialCopies
from lightning_prune.channels.graph.splits import FIRST_DIM, HEAD_DIM, LAST_DIM, SPLIT_HEAD_DIM
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import as_probe

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Notes the shapes of all that it is run on, in copies of it, too."""

    calls: list[tuple[torch.Size, torch.dtype, bool]]

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 24, 3, stride=2, padding=1)
        self.between, self.head = between or nn.ReLU(), nn.Linear(24, 5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        Counting.calls.append((images.shape, images.dtype, self.training))
        hidden: Tensor = self.between(self.two(self.one(images).relu()))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


@pytest.fixture(autouse=True)
def _calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "calls", [], raising=False)


def units(model: nn.Module, example: Tensor = IMAGES) -> dict[str, int]:
    return {group.name: group.size for group in Channels().units(model, example).groups}


def pruned(model: nn.Module, example: Tensor) -> Pruner:
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    return pruner


def test_trials_run_on_inputs_as_small_as_the_model_runs_alike_on() -> None:
    few = torch.randn(1, 3, 12, 12)  # no smaller inputs are looked for where they save nothing
    assert units(Counting(), few) == {"one": 32, "two": 24}
    plain = len(Counting.calls)
    Counting.calls.clear()
    large = torch.randn(8, 3, 384, 384)
    assert units(Counting(), large) == {"one": 32, "two": 24}
    assert len(Counting.calls) <= plain + 5
    # a pass to record what it does, another one in training mode, and one to follow the channels
    assert [shape for shape, *_ in Counting.calls].count(large.shape) == 3
    assert all(shape.numel() <= large.numel() / 16 for shape, *_ in Counting.calls if shape != large.shape)


class Heads(nn.Module):
    """Attention of four heads, whose keys, queries and values one layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(hidden.flatten(2).mT).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        made: Tensor = self.out(mixed).mT.view_as(hidden)
        return made


def test_all_ways_to_split_dimensions_are_followed_in_two_passes() -> None:
    model, splits = Counting(Heads()), [LAST_DIM, HEAD_DIM, SPLIT_HEAD_DIM, FIRST_DIM]
    passes = record_passes(model, as_probe(IMAGES))
    Counting.calls.clear()
    traces = trace_model(model, passes, splits)
    assert len(Counting.calls) == 2 * len(passes)
    # keys, queries and values, heads, channels within heads: both kinds of splits at heads choose the second
    assert traces[1] is traces[2]
    assert len(set(traces)) == 3


def test_splits_that_choose_alike_share_a_trace() -> None:
    model = Counting()
    passes = record_passes(model, as_probe(IMAGES))
    Counting.calls.clear()
    assert len(set(trace_model(model, passes, [LAST_DIM, FIRST_DIM]))) == 1
    assert len(Counting.calls) == len(passes)


class Casting(Counting):
    """Notes to which types it is cast, in copies of it, too."""

    casts: ClassVar[list[torch.dtype]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Casting:
        Casting.casts.append(fn(torch.zeros(1)).dtype)
        return super()._apply(fn, recurse)


def test_trials_in_double_precision_take_one_copy() -> None:
    Casting.casts.clear()
    assert units(Casting()) == {"one": 32, "two": 24}
    # what first trials share; then the masked network, which is cut when it has run
    assert Casting.casts == [torch.float32, torch.float64]


def test_no_other_copy_is_kept_beside_those_in_double_precision() -> None:
    model = Counting()
    perturbed = copy_model(model)
    alive = ref(perturbed)
    copies = TrialCopies(model, perturbed, frozenset())
    del perturbed
    copies.begin(torch.float32, cast=True)
    copies.refine()
    assert alive() is None
    first, again = copies.whole(), copies.whole()
    assert torch.equal(first.one.weight, again.one.weight)
    assert not torch.equal(first.one.weight, model.one.weight.double())


class Literal(nn.Module):
    """Runs on images of one size only."""

    def forward(self, hidden: Tensor) -> Tensor:
        assert hidden.shape[2:] == (96, 96)
        return hidden.relu()


def test_inputs_stay_where_the_model_runs_on_no_others() -> None:
    example = torch.randn(4, 3, 384, 384)
    assert units(Counting(Literal()), example) == {"one": 32, "two": 24}
    assert {shape[2:] for shape, *_ in Counting.calls} >= {(384, 384)}


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)])
def test_dropout_needs_no_passes_of_its_own(between: nn.Module) -> None:
    assert units(Counting()) == {"one": 32, "two": 24}
    plain = list(Counting.calls)
    Counting.calls.clear()
    assert units(Counting(between)) == {"one": 32, "two": 24}
    assert Counting.calls == plain
    assert any(training and dtype is torch.float64 for _, dtype, training in plain)


class Noisy(nn.Module):
    """Does something else in training mode."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 0.9 if self.training else hidden


def test_what_differs_in_training_mode_is_followed_there() -> None:
    assert units(Counting(Noisy())) == {"one": 32, "two": 24}
    assert sum(training for *_, training in Counting.calls) > 4


class Scaling(nn.Module):
    """Writes to its weight in training mode, even where it then cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            assert (self.weight < 100).all()
            self.weight.data.mul_(100)
            assert len(rows) > 1
        return rows * self.weight


def test_a_pass_that_fails_leaves_nothing_to_the_next_one() -> None:
    records = record_passes(Scaling(), as_probe([torch.ones(1, 4), torch.ones(3, 4)]))
    assert any(each.runs_in_training or each.probe.training for each in records)


def test_an_analysis_serves_again_until_the_module_changes() -> None:
    model = Counting()
    pruner = pruned(model, IMAGES)
    Counting.calls.clear()
    small = compact(model, pruner.masks, IMAGES)
    assert small.one.out_channels == 16
    # whether other inputs give numbers now; the masked and the cut network, on the example and on those
    assert [dtype for _, dtype, _ in Counting.calls] == [torch.float32, *[torch.float64] * 4]
    Counting.calls.clear()
    first = Channels().units(model, IMAGES)
    assert not Counting.calls
    with torch.no_grad():
        model.one.weight.mul_(2)  # as training does
    assert Channels().units(model, IMAGES) is not None
    assert Channels(round_to=8).units(model, IMAGES).groups[0].name == first.groups[0].name
    assert not Counting.calls


class Config:
    """Settings that a forward reads, as those of Hugging Face's models."""

    mixes = False


CHANGES: dict[str, Callable[[Counting], object]] = {
    "layer": lambda model: setattr(model, "two", nn.Conv2d(32, 24, 1)),
    "number": lambda model: setattr(model, "share", 0.5),
    "list": lambda model: setattr(model, "sizes", [*model.sizes, 2]),
    "hook": lambda model: model.one.register_forward_hook(lambda *_: None),
    "frozen": lambda model: model.one.requires_grad_(False),
    "type": lambda model: setattr(model, "between", nn.GELU()),
    "object": lambda model: setattr(model.config, "mixes", True),
    "set": lambda model: model.flags.add("mixes"),
    "type of a number": lambda model: setattr(model, "sizes", [True]),
    "another object of the same place": lambda model: (delattr(model, "act"), setattr(model, "act", nn.Tanh())),
    "attribute of a layer": lambda model: setattr(model.one, "stride", (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_it_is_made_anew_when_the_module_has_changed(change: Callable[[Counting], object]) -> None:
    model = Counting()
    model.sizes, model.config, model.flags, model.act = [1], Config(), {"plain"}, nn.ReLU()
    units(model)
    change(model)
    Counting.calls.clear()
    units(model)
    assert Counting.calls


def test_it_is_made_anew_for_another_example() -> None:
    model, example = Counting(), IMAGES.clone()
    units(model, example)
    written, replaced = example.clone(), example.clone()
    units(model, replaced)
    replaced.data = torch.randn(2, 3, 96, 96)
    for other in (IMAGES.clone(), written.add_(1), replaced):
        Counting.calls.clear()
        units(model, other)
        assert Counting.calls


def test_no_example_is_kept_alive() -> None:
    for size in (8, 96, 384):
        model, examples = Counting(), [torch.randn(2, 3, size, size) for _ in range(2)]
        Channels().units(model, examples)
        seen = [*map(ref, examples)]
        del examples
        assert [each() for each in seen] == [None] * 2


class Sized(nn.Module):
    """Does something else in training mode, on large images only."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training and hidden.shape[-1] >= 64:
            return hidden * torch.linspace(0.5, 1.5, 24).view(1, 24, 1, 1)
        return hidden


def test_what_differs_on_the_inputs_of_the_example_is_found() -> None:
    model, example = Counting(Sized()), torch.randn(4, 3, 384, 384)
    assert units(model, example) == {"one": 32}


def test_weights_that_give_nan_now_are_told() -> None:
    model = Counting()
    pruner = pruned(model, IMAGES)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    with pytest.raises(CompactionError, match="gives nan"):
        compact(model, pruner.masks, IMAGES)


def test_noise_differs_from_row_to_row() -> None:
    """The same random numbers are used again and again; rows of any length get other ones."""
    model = nn.Linear(1024, 3000, bias=False)
    nn.init.zeros_(model.weight)
    perturb_(model)
    assert len(model.weight.detach().unique(dim=0)) == 3000
    wide = nn.Conv2d(64, 48, 11).to(memory_format=torch.channels_last)
    before = wide.weight.detach().clone()
    perturb_(wide)
    assert len((wide.weight.detach() - before).unique(dim=0)) == 48


class Shared(nn.Module):
    """Refers to its own modules from attributes that come before them, and to one dict twice."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[nn.Module] = []
        self.one = nn.Linear(3, 3)
        self.later.append(self.one)
        self.table = self.again = {"sizes": [1, 2], "layer": self.one}
        self.hidden = self.one.weight * 2


class OwnProtocol(nn.Module):
    """Makes its copy anew, out of what its modules are."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width))

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.width = self.inner[0].in_features


def test_modules_that_copy_themselves_find_those_within_complete() -> None:
    twin = copy_model(nn.Sequential(nn.Sequential(OwnProtocol())))
    assert twin[0][0].width == 3
    assert twin[0][0].inner[0].weight.shape == (3, 3)


def test_keys_of_dicts_and_results_that_modules_share_are_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.scales = {model[0]: 2.0}
    model[0].held = [(model[1].weight * 2, None)]
    model[1].result = model[0].held[0][0]
    twin = copy_model(model)
    assert list(twin.scales) == [twin[0]]
    assert twin[1].result is twin[0].held[0][0]


def test_noise_in_half_precision_is_finite() -> None:
    model = nn.Linear(2048, 2048).half()
    nn.init.normal_(model.weight, std=0.1)
    perturb_(model)
    assert model.weight.isfinite().all()


def test_copies_are_those_of_deepcopy() -> None:
    model = Shared()
    twin = copy_model(model)
    assert twin.later == [twin.one]
    assert twin.one is not model.one
    assert twin.table is twin.again
    assert twin.table["layer"] is twin.one
    assert twin.table["sizes"] == [1, 2]
    assert twin.table["sizes"] is not model.table["sizes"]
    assert torch.equal(twin.hidden, model.hidden)
    assert not twin.hidden.requires_grad
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LSTM(4, 4))
    theirs, ours = copy.deepcopy(plain), copy_model(plain)
    assert [*map(type, theirs.modules())] == [*map(type, ours.modules())]
    for one, other in zip(theirs.modules(), ours.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
        assert ours.state_dict()[name].data_ptr() != plain.state_dict()[name].data_ptr()
