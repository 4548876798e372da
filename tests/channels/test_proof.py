"""The proof: every way through a network is compared, numbers are changed only if they are sizes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import check
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, Global, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.compaction.proof import Proof
from lightning_prune.channels.compaction.shrink import Compacted, compact_
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import as_probe

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pruned(model: nn.Module, example: Any, target: float = 0.5, selector: Any = None) -> Pruner:
    selector = selector or PerLayer()
    pruner = Pruner(model, target, structure=Channels(), selector=selector, schedule=None, example=example)
    pruner.prune(1.0)
    return pruner


def compacted(model: nn.Module, example: Any) -> tuple[Any, Compacted]:
    """Return a compacted copy, and what compaction has done."""
    pruner = pruned(model, example)
    small = copy.deepcopy(model)
    return small, compact_(small, pruner.masks, None, as_probe(example))


def proof_of(model: nn.Module, example: Any) -> Proof:
    proof = compacted(model, example)[1].proof
    assert proof is not None
    return proof


def sizes(pruner: Pruner) -> dict[str, int]:
    return {group.name: group.size for group in pruner.groups}


def same(model: nn.Module, small: nn.Module, *arguments: Any) -> None:
    """Check that the two networks give the same in evaluation mode."""
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(*arguments), model.eval()(*arguments), rtol=1e-4, atol=1e-5)


class Rows(nn.Module):
    """Three layers on rows, with a function between the second and the third."""

    def __init__(self, between: Callable[..., Tensor] = lambda model, hidden: hidden.relu()) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.between = between

    def forward(self, rows: Tensor) -> Tensor:
        return self.three(self.between(self, self.two(self.one(rows).relu())))


# --- inputs


class Nested:
    """Tensors in an object with slots, as detectors have them."""

    __slots__ = ("mask", "tensors")

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask = tensors, mask


@dataclass
class Inputs:
    inner: Nested


class Detector(nn.Module):
    """Takes a list of images, or objects that hold a batch of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 4)

    def forward(self, given: Any) -> Tensor:
        if isinstance(given, list):
            given = Inputs(Nested(torch.stack(given), torch.zeros(len(given), 4, 4)))
        images, mask = given.inner.tensors, given.inner.mask
        return self.head((self.two(self.one(images).relu()) + mask[:, None].to(images)).mean((2, 3)))


@pytest.mark.parametrize(
    "example",
    [(Inputs(Nested(IMAGES, torch.zeros(2, 4, 4))),), ([IMAGES[0], IMAGES[1]],)],
    ids=["object", "list"],
)
def test_inputs_of_any_kind_are_compared_in_double_precision(example: Any) -> None:
    assert sizes(pruned(Detector(), example)) == {"one": 16, "two": 12}
    proof = proof_of(Detector(), example)
    assert (proof.precision, proof.tensors) == ("float64", proof.passes)
    assert proof.difference < 1e-12


# --- precision


def single(model: Rows, hidden: Tensor) -> Tensor:
    if hidden.dtype is not torch.float32:
        raise TypeError("only in single precision")
    return hidden.relu()


def overflowing(model: Rows, hidden: Tensor) -> Tensor:
    """Hide no position, by a mask of single precision times the least number of the weights' type."""
    return hidden.relu() + (1 - torch.ones(1)) * torch.finfo(hidden.dtype).min


@pytest.mark.parametrize("between", [single, overflowing], ids=["error", "nan"])
def test_a_model_of_single_precision_is_compared_in_it(between: Any) -> None:
    proof = proof_of(Rows(between), ROWS)
    assert proof.precision == "float32"
    assert proof.difference < 1e-6
    assert proof_of(Rows(), ROWS).precision == "float64"


@pytest.mark.parametrize("between", [single, lambda model, hidden: hidden.relu()], ids=["single", "double"])
@pytest.mark.parametrize("share", [1e-5, 1e-3])
def test_a_difference_that_is_no_rounding_error_is_refused(between: Any, share: float) -> None:
    """What depends on the width differs by less than a fixed tolerance of single precision would see."""

    def wide(model: Rows, hidden: Tensor) -> Tensor:
        return between(model, hidden) * (1 + share * hidden.shape[1])

    pruner = pruned(Rows(wide), ROWS)
    assert sizes(pruner) == {"one": 16}
    assert pruner.frozen["two"].startswith("cannot be cut: outputs change by")


def double(model: Rows, hidden: Tensor) -> Tensor:
    return hidden.relu() if hidden.dtype is torch.float64 else hidden / "only in double precision"


def test_models_run_in_the_types_that_their_code_fixes() -> None:
    assert sizes(pruned(Rows(double).double(), ROWS.double())) == {"one": 16, "two": 12}
    mixed = Rows(lambda model, hidden: hidden.float().relu())
    mixed.one, mixed.two = mixed.one.bfloat16(), mixed.two.bfloat16()
    assert "two" in sizes(pruned(mixed, ROWS.bfloat16()))


def test_large_numbers_that_stand_for_inf_hide_no_difference() -> None:
    def filled(model: Rows, hidden: Tensor) -> Tensor:
        return hidden.relu() / hidden.shape[1]

    class Filled(Rows):
        def forward(self, rows: Tensor) -> Tensor:
            logits = super().forward(rows)
            return logits.masked_fill(torch.tensor([True, False, False]), torch.finfo(logits.dtype).min)

    assert sizes(pruned(Filled(filled), ROWS)) == {"one": 16}


# --- sizes that modules keep


class Local(nn.Module):
    """Attention with 8 heads, over a window of 8 neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.window, self.layer = 8, 4, 8, 8
        self.first, self.qkv, self.out, self.last = (
            nn.Linear(*each) for each in ((8, 32), (32, 96), (32, 6), (6, 2))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        split = self.qkv(self.first(tokens)).view(batch, length, 3, self.heads, self.size)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        place = torch.arange(length)
        far = (place[:, None] - place).abs() > self.window
        weights = (query @ key.transpose(-2, -1)).masked_fill(far, -torch.inf).softmax(-1)
        return self.last(self.out((weights @ value).transpose(1, 2).flatten(2)))


def test_numbers_that_only_equal_a_width_stay_and_are_listed() -> None:
    torch.manual_seed(0)
    model = Local()
    pruner = pruned(model, TOKENS)
    (heads,) = (group for group in pruner.groups if group.heads)
    assert heads.attributes == (("", "heads"),)
    small = copy.deepcopy(model)
    done = compact_(small, pruner.masks, pruner.groups, as_probe(TOKENS))
    assert (small.heads, small.window, small.layer, small.size) == (4, 8, 8, 4)
    assert {"window=8", "layer=8"} <= {*done.unchanged}
    assert "heads=8" not in done.unchanged
    same(model, small, torch.randn(2, 20, 8))  # here the window matters


class Flat(nn.Module):
    """Mixes positions into channels: right for the length of the example only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 6, 1), nn.Linear(6, 2)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.one(rows).relu().reshape(len(rows), -1, 16).transpose(1, 2)
        return self.three(self.two(hidden).relu().mean(-1))


class Logarithmic(Rows):
    """Gives nan when one of many small numbers changes its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((20,), 1e-3))

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * self.scale.log().sum()


def test_what_gives_nan_is_told() -> None:
    assert bool(Logarithmic()(ROWS).isfinite().all())
    with pytest.raises(
        ValueError, match=r"^the model gives nan for the example, or does when its weights change"
    ):
        pruned(Logarithmic(), ROWS)
    with pytest.raises(ValueError, match=r"^the model gives nan for the example: nothing can be compared"):
        compact_(Logarithmic(), {}, (), as_probe(ROWS * torch.nan))


def test_what_is_right_for_the_size_of_the_example_only_is_refused() -> None:
    model = Flat()
    pruner = pruned(model, torch.randn(2, 8, 1))
    assert sizes(pruner) == {"two": 6}
    small = compact(model, pruner.masks, torch.randn(2, 8, 1))
    same(model, small, torch.randn(2, 8, 7))


# --- every way through the module


class Tasks(nn.Module):
    """Two heads, of which an argument chooses one."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.body, self.flat = nn.Conv1d(8, 16, 1), flat
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 5), "b": nn.Linear(16 * (5 if flat else 1), 3)})

    def forward(self, rows: Tensor, task: str) -> Tensor:
        features = self.body(rows).relu()
        return self.heads[task](features.flatten(1) if task == "b" and self.flat else features.mean(-1))


LINES = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flat", [False, True])
def test_a_head_that_no_example_runs_keeps_what_it_may_read(flat: bool) -> None:
    with pytest.raises(
        ValueError, match=r"body: may be read by heads\.b, which the example does not run.*example=\["
    ):
        pruned(Tasks(flat=flat), (LINES, "a"))


@pytest.mark.parametrize("flat", [False, True])
def test_several_examples_show_every_way(flat: bool) -> None:
    model, examples = Tasks(flat=flat), [(LINES, "a"), {"rows": LINES, "task": "b"}]
    pruner = pruned(model, examples)
    assert sizes(pruner) == {"body": 16}
    small = compact(model, pruner.masks, examples)
    assert small.body.out_channels == 8
    same(model, small, LINES, "a")
    same(model, small, LINES, "b")


def test_a_list_of_no_examples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"example=\[\]"):
        pruned(Rows(), [])


@pytest.mark.parametrize(("inputs", "kept"), [(32, "one"), (24, "two"), (28, "one"), (28, "two")])
def test_a_layer_that_may_read_two_outputs_side_by_side_keeps_them(inputs: int, kept: str) -> None:
    model = Rows()
    model.pair = nn.Linear(inputs, 2)
    with (
        pytest.raises(ValueError, match=rf"[ ,]{kept}.*: may be read by pair")
        if inputs == 28
        else nullcontext()
    ):
        assert pruned(model, ROWS).frozen[kept].startswith("may be read by pair")


def test_a_head_with_other_inputs_keeps_nothing() -> None:
    model = Rows()
    model.probe = nn.Linear(7, 2)
    assert sizes(pruned(model, ROWS)) == {"one": 16, "two": 12}


class Auxiliary(nn.Module):
    """Gives logits, and in training mode a second head's beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(8, 16), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, rows: Tensor) -> Any:
        features = F.dropout(self.body(rows).relu(), 0.5, self.training)
        return (self.head(features), self.aux(features)) if self.training else self.head(features)


def test_training_mode_is_compared_too() -> None:
    model = Auxiliary()
    small, done = compacted(model, ROWS)
    assert small.aux.in_features == 8
    assert done.proof is not None
    assert done.proof.passes >= 3  # evaluation, training, other inputs
    logits, auxiliary = small.train()(ROWS)
    (logits + auxiliary).sum().backward()
    assert small.aux.weight.grad.shape == (5, 8)


class Stems(nn.Module):
    """Two stems that run the same ops on weights of the same shapes, and a body."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(8, 16)})
        self.body, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, rows: Tensor, task: str) -> Tensor:
        return self.head(self.body(self.stems[task](rows).relu()).relu())


def test_passes_that_differ_in_their_weights_alone_are_all_followed() -> None:
    model, examples = Stems(), [(ROWS, "a"), (ROWS, "b")]
    pruner = pruned(model, examples)
    assert sizes(pruner) == {"stems.a": 16, "body": 12}
    small = compact(model, pruner.masks, examples)
    same(model, small, ROWS, "a")
    same(model, small, ROWS, "b")


def with_embedding(model: Rows) -> None:
    model.unseen = nn.Embedding(5, 16)


def with_buffer(model: Rows) -> None:
    model.register_buffer("unseen", torch.randn(5, 16))


def with_scale(model: Rows) -> None:
    model.unseen = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("add", [with_embedding, with_buffer, with_scale])
def test_whatever_no_pass_runs_keeps_what_it_may_meet(add: Callable[[Rows], None]) -> None:
    add(model := Rows())
    pruner = pruned(model, ROWS)
    assert sizes(pruner) == {"two": 12}
    what = "be read by unseen" if add is with_embedding else "meet unseen, which the example does not use"
    assert pruner.frozen["one"].startswith(f"may {what}")


class Beside(nn.Module):
    """A convolution, and a layer that nothing runs with as many inputs as a channel has positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unseen = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 1), nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.two(self.one(images).relu())


def test_an_unseen_layer_of_another_size_keeps_nothing() -> None:
    assert sizes(pruned(Beside(), IMAGES)) == {"one": 16}


@pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_keeps_nothing(drop: Callable[[float], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 1), drop(0.2), nn.Conv1d(16, 12, 1), nn.ReLU(), nn.Conv1d(12, 2, 1))
    assert sizes(pruned(model, LINES)) == {"0": 16, "2": 12}


# --- fast paths


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 32), nn.Linear(32, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_fast_path_that_the_example_does_not_take_works_after_the_cut() -> None:
    torch.manual_seed(0)
    model, ids = Text().eval(), torch.randint(0, 30, (3, 9))
    pruner = pruned(model, ids)
    small = compact(model, pruner.masks, ids)
    assert [layer.self_attn.num_heads for layer in small.encoder.layers] == [2, 2]
    padding = torch.arange(9) > torch.tensor([[5], [8], [3]])
    for arguments in ((ids,), (ids, padding)):
        same(model, small, *arguments)
        small.train()  # and the way without the fast path
        assert small(*arguments).shape == (3, 5)


# --- parts that are not followed


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.inner = torch.jit.script(nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 16)))
        self.act = torch.jit.script(scripted)

    def forward(self, rows: Tensor) -> Tensor:
        return self.three(self.act(self.two(self.inner(self.one(rows)))))


def scripted(value: Tensor) -> Tensor:
    return value.relu() * 2


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.one, self.two = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 64, 1), nn.Conv1d(64, 1, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 6, dtype=torch.cfloat))

    def forward(self, lines: Tensor) -> Tensor:
        lifted = self.lift(lines)
        spectrum = torch.einsum("bix,iox->box", torch.fft.rfft(lifted)[..., :6], self.weight)
        return self.two(self.one(torch.fft.irfft(spectrum, n=lines.shape[-1])).relu())


class Hooked(Rows):
    """A hook and an attribute that are closures: over a layer of the model, and over a list that both share."""

    def __init__(self, *, foreign: bool = False) -> None:
        super().__init__()
        self.adapter = nn.Linear(16, 16)
        adapter, kept = (nn.Linear(16, 16) if foreign else self.adapter), []
        self.one.register_forward_hook(lambda module, given, output: output + adapter(output))
        self.two.register_forward_hook(lambda module, given, output: kept.append(output))
        self.pop = kept.pop

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + self.pop().sum(1, keepdim=True)


PARTS = [
    (Scripted, ROWS, {"two": 12}, {"one.weight": "coupled with, inner: compiled TorchScript code has fixed"}),
    (
        Spectral,
        torch.randn(2, 1, 32),
        {"one": 64},
        {"weight": "complex", "lift.weight": "multiplied by values"},
    ),
    (Hooked, ROWS, {"one": 16, "two": 12}, {}),
]


@pytest.mark.parametrize(("make", "example", "groups", "reasons"), PARTS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_one_part_freezes_what_it_touches_and_nothing_else(
    make: type[nn.Module], example: Tensor, groups: dict[str, int], reasons: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = make()
    pruner = pruned(model, example)
    assert sizes(pruner) == groups
    for name, reason in reasons.items():
        assert reason in pruner.frozen[name]
    same(model, compact(model, pruner.masks, example), example)


def mapped(model: Rows, hidden: Tensor) -> Tensor:
    return torch.vmap(lambda row: model.more(model.extra(row).relu()))(hidden)


def chosen(model: Rows, hidden: Tensor) -> Tensor:
    return torch.cond(hidden.sum() > 0, lambda rows: rows.relu(), lambda rows: rows.tanh(), (hidden,))


def test_a_function_that_is_mapped_over_rows_is_followed() -> None:
    model = Rows(mapped)
    model.extra, model.more = nn.Linear(12, 12), nn.Linear(12, 12)
    pruner = pruned(model, ROWS)
    assert sizes(pruner) == {"one": 16, "two": 12, "extra": 12, "more": 12}
    same(model, compact(model, pruner.masks, ROWS), ROWS)


def test_an_op_that_is_not_followed_freezes_what_it_meets_and_nothing_else() -> None:
    pruner = pruned(Rows(chosen), ROWS)
    assert sizes(pruner)["one"] == 16
    assert pruner.frozen["two.weight"] == "feeds cond, which is not followed"


def test_a_closure_over_another_model_freezes_what_it_touches() -> None:
    assert sizes(pruned(Hooked(foreign=True), ROWS)) == {"two": 12}


# --- what the analysis allows


class OneHead(nn.Module):
    """Attention of one head, whose queries and keys and whose values take their size from one number."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            each(tokens).view(*tokens.shape[:2], -1, self.size).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("selector", [PerLayer(), Global()], ids=repr)
def test_groups_that_change_one_number_become_one(selector: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OneHead(), nn.Linear(8, 3))
    pruner = pruned(model, TOKENS, selector=selector)
    (joined,) = (group for group in pruner.groups if group.attributes)
    assert {part.name for part in joined.slices if "weight" in part.name} == {
        "0.query.weight",
        "0.key.weight",
        "0.value.weight",
    }
    same(model, compact(model, pruner.masks, TOKENS), TOKENS)


class Scaled(Rows):
    """Scales by a number that equals a width, by less than single precision sees."""

    def __init__(self) -> None:
        super().__init__(lambda model, hidden: hidden.relu() * (1 + 1e-8 * model.width / hidden.shape[1]))
        self.width = 12


def test_a_cut_that_only_double_precision_sees_to_be_wrong_is_tried_with_the_number() -> None:
    model = Scaled()
    pruner = pruned(model, ROWS)
    assert {group.name: group.attributes for group in pruner.groups} == {"one": (), "two": (("", "width"),)}
    assert compact(model, pruner.masks, ROWS).width == 6


class Router(nn.Module):
    """Reads channels that others make, and keeps their number, as routers of mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 12
        self.weight = nn.Parameter(torch.randn(3, 12))

    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.hidden_dim) @ self.weight.T


def test_modules_that_read_units_may_keep_their_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Sequential(nn.Sequential(Router(), nn.Linear(3, 3))))
    pruner = pruned(model, ROWS)
    assert {group.name: group.attributes for group in pruner.groups} == {
        "0": (("2.0.0", "hidden_dim"),),
        "2.0.0": (),
    }
    small = compact(model, pruner.masks, ROWS)
    assert (small[0].out_features, small[2][0][0].hidden_dim) == (6, 6)
    same(model, small, ROWS)


class Squeezed(nn.Module):
    """Squeezes every dimension of size 1, also that of a last channel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, lines: Tensor) -> Tensor:
        return self.up(self.down(lines).mean(-1, keepdim=True).squeeze())


def test_a_group_keeps_two_units_where_one_does_not_work() -> None:
    model = Squeezed()
    pruner = pruned(model, LINES, target=0.9)
    assert [group.minimum for group in pruner.groups] == [2]
    assert compact(model, pruner.masks, LINES).down.out_channels == 2


def test_a_number_of_units_that_has_to_be_even_is_no_free_number() -> None:
    def even(model: Rows, hidden: Tensor) -> Tensor:
        return hidden.relu() if hidden.shape[1] % 2 == 0 else hidden / "odd"

    assert sizes(pruned(Rows(even), ROWS)) == {"one": 16}


def test_a_subclass_of_a_layer_with_another_weight_stays_alone() -> None:
    class Ensemble(nn.Linear):
        def __init__(self) -> None:
            super().__init__(12, 12)
            self.weight = nn.Parameter(torch.randn(2, 12, 12))

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.einsum("bi,eoi->beo", hidden, self.weight).mean(1)

    model = Rows(lambda model, hidden: model.ensemble(hidden).relu())
    model.ensemble = Ensemble()
    pruner = pruned(model, ROWS)
    assert {"one", "two"} <= sizes(pruner).keys()
    same(model, compact(model, pruner.masks, ROWS), ROWS)


class Dropping(Rows):
    """Skips a layer now and then in training mode."""

    def __init__(self) -> None:
        super().__init__(
            lambda model, hidden: hidden if model.training and random.random() < 0.5 else hidden.relu()
        )


def test_a_pass_takes_one_way_each_time() -> None:
    model = Dropping()
    state = random.getstate()
    pruner = pruned(model, ROWS)
    same(model, compact(model, pruner.masks, ROWS), ROWS)
    assert random.getstate() == state


def test_noise_makes_a_masked_network_look_like_a_dense_one() -> None:
    model = nn.Linear(50, 40, bias=False)
    with torch.no_grad():
        model.weight[:30] = 0
    mean = float(model.weight.detach()[30:].abs().mean())
    perturb_(model)
    assert float(model.weight.detach()[:30].abs().mean()) > mean / 3


@pytest.mark.parametrize("infinity", [-torch.inf, -1e9])
def test_noise_leaves_masks_alone(infinity: float) -> None:
    model = nn.Linear(3, 3)
    mask = torch.full((5, 5), infinity).triu(1)
    model.register_buffer("mask", mask.clone())
    perturb_(model)
    assert torch.equal(model.mask, mask)


def test_copies_have_closures_of_their_own() -> None:
    model = Hooked()
    twin = copy_model(model)
    twin(ROWS)
    (cell,) = (each.cell_contents for hook in twin.one._forward_hooks.values() for each in hook.__closure__)
    assert cell is twin.adapter


class Wrapped(Rows):
    """Runs its layers through closures in closures, lists, partial functions and its own bound ``forward``."""

    def __init__(self) -> None:
        super().__init__()

        def twice(run: Any, count: int) -> Any:
            return (lambda rows: run(rows) + 0) if count == 0 else twice(run, count - 1)

        self.runs = [lambda rows: self.one(rows) + 0, partial(lambda layer, rows: layer(rows), self.two)]
        self.last = partial(lambda rows: self.three(rows) + 0)
        self.forward = twice(self.forward, 2)

    def forward(self, rows: Tensor) -> Tensor:
        first, second = self.runs
        return self.last(second(first(rows).relu()).relu())


def test_copies_have_functions_of_their_own() -> None:
    model, rows = Wrapped(), ROWS
    before, twin = model(rows), copy_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(rows), before)
    assert not model(rows).any()
    assert sizes(pruned(Wrapped(), rows)) == {"one": 16, "two": 12}


# --- the property


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_networks_are_equal_in_every_way_or_refused(seed: int) -> None:
    check(seed)


class Sine(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows.sin()


def test_weights_are_not_made_larger_where_rounding_errors_would_grow() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(80)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*(each for layer in layers for each in (layer, Sine())), nn.Linear(16, 2))
    units = Channels().units(model, torch.randn(2, 16))
    assert [group.size for group in units.groups] == [16] * 80
