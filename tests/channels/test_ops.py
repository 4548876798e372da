"""Channels reach the other side of an op: what goes, and that masked and compacted networks are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks_by_coupling import IMAGES, TOKENS, Net, conv, head
from networks_by_op import CASES, Case, blur, of_images, of_tokens, partial_blocks
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, PerLayer, Pruner, compact, register_rule
from lightning_prune.channels.compaction.size_attributes import attribute_choices


@torch.library.custom_op("tests::negative", mutates_args=())
def negative(x: Tensor) -> Tensor:
    return -x


@torch.library.custom_op("tests::full", mutates_args=())
def full(x: Tensor) -> Tensor:
    return x * 2


def outputs(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model).double().eval()(example.double())
    return result


def halved(model: nn.Module, example: Tensor, tolerance: float = 1e-12) -> list[int]:
    """Prune half of each group, compact, compare the outputs, and return the number of units of each group."""
    torch.manual_seed(0)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, example)
    expected = outputs(model, example)
    assert (outputs(smaller, example) - expected).abs().max() <= tolerance * expected.abs().max()
    kept = sum(parameter.numel() for parameter in smaller.parameters())
    assert kept < sum(parameter.numel() for parameter in model.parameters())
    return [group.size for group in pruner.groups]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}: {case.name}")
def test_channels_reach_the_other_side_of_an_op(case: Case) -> None:
    single = case.row == "rotary embeddings"  # in single precision, as in LLaMA
    assert halved(case.make(), case.example, 1e-6 if single else 1e-12) == case.sizes


def test_regions_and_deformed_convolutions() -> None:
    ops = pytest.importorskip("torchvision.ops")

    def regions(m: nn.Module, y: Tensor) -> Tensor:
        return ops.roi_align(y, [torch.tensor([[0.0, 0.0, 4.0, 4.0]]).to(y)] * len(y), 3)

    assert halved(of_images(regions), IMAGES) == [8, 6]

    for parts, sizes in ((1, [8, 6, 7]), (2, [4, 6, 7])):
        model = of_images(
            lambda m, y: ops.deform_conv2d(y, m.offset(y), m.deformed.weight, m.deformed.bias, padding=1),
            after=7,
            offset=conv(8, parts * 18),
            deformed=conv(8, 7),
        )
        assert halved(model, IMAGES) == sizes
        why = "decides what deform_conv2d takes"
        assert Channels().units(model, IMAGES).frozen["offset.weight"] == why


# --- what stays, and why


def frozen(model: nn.Module) -> dict[str, str]:
    return Channels().units(model, IMAGES).frozen


def test_one_number_of_all_blocks_is_a_choice_however_many_there_are() -> None:
    model = partial_blocks(7)
    (rest,) = (group for group in Channels().units(partial_blocks(1), IMAGES).groups if group.size == 5)
    sized_in = tuple(str(number) for number in range(1, 8))
    choices = attribute_choices(model, replace(rest, sized_in=sized_in, followers=()))
    assert choices[7] == tuple((str(number), "others") for number in range(1, 8))
    assert sorted(map(len, choices)) == [1] * 7 + [2] * 21 + [3] * 20 + [7]


def test_parts_of_literal_sizes_stay() -> None:
    model = of_images(lambda m, y: torch.cat([m.part(y.split([2, 6], 1)[0]), y[:, 2:]], 1), part=conv(2, 2))
    assert "split_sizes to sum exactly" in frozen(model)["one.weight"]


def test_channels_that_are_written_into_a_part_of_others_stay() -> None:
    def twice(m: nn.Module, y: Tensor) -> Tensor:
        wide = y.new_empty(len(y), 2 * y.shape[1], *y.shape[2:])
        wide[:, : y.shape[1]] = wide[:, y.shape[1] :] = y
        return wide

    assert frozen(of_images(twice, after=16))["one.weight"] == "is written into a part of another tensor"


def test_filters_that_differ_are_not_cut_with_the_channels() -> None:
    def filtered(m: nn.Module, y: Tensor) -> Tensor:
        filters = m.blur.values * torch.arange(8.0).view(-1, 1, 1, 1).to(y)
        return F.conv2d(y, filters, groups=8)

    why = "reads values that cannot shrink with it, such as an input"
    assert frozen(of_images(filtered, blur=blur()))["one.weight"] == why


@pytest.mark.parametrize("dim", [1, -3])
@pytest.mark.parametrize("op", [torch.sort, torch.cummax, lambda y, dim: (torch.fft.fft(y, dim=dim).real,)])
def test_what_is_ordered_or_mixed_along_the_channels_stays(op: object, dim: int) -> None:
    assert callable(op)
    model = of_images(lambda m, y: op(y, dim=dim)[0])
    assert "mixes all channels" in frozen(model)["one.weight"]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_knows_its_width_after_a_cut(kind: type[nn.Embedding | nn.EmbeddingBag]) -> None:
    model, words = nn.Sequential(kind(10, 8), nn.Linear(8, 3)), torch.arange(6).view(2, 3)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=words)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, words)
    assert smaller.get_submodule("0").embedding_dim == 4


def test_an_embedding_whose_columns_stay_says_why_they_do() -> None:
    model = Net(
        lambda m, x: (words := m.words((x[:, 0, 0] * 3).abs().long()), m.two(m.one(words).relu())),
        words=nn.Embedding(20, 8),
        one=nn.Linear(8, 6),
        two=nn.Linear(6, 3),
    )
    assert frozen(model)["words.weight"] == "is the network's output"


@pytest.mark.parametrize("keywords", [False, True])
def test_channels_by_whose_number_attention_scales_stay(keywords: bool) -> None:
    def attend(m: nn.Module, y: Tensor, **scale: float) -> Tensor:
        rows = y.flatten(2).mT
        given = {"query": m.query(rows), "key": m.key(rows), "value": rows}
        mixed = (
            F.scaled_dot_product_attention(**given, **scale)
            if keywords
            else F.scaled_dot_product_attention(*given.values(), **scale)
        )
        return mixed.mT.reshape_as(y)

    def make(**scale: float) -> nn.Module:
        layers = {"query": nn.Linear(8, 7), "key": nn.Linear(8, 7)}
        return of_images(lambda m, y: attend(m, y, **scale), **layers)

    why = frozen(make())
    scales = "feeds scaled_dot_product_attention, which scales by their number unless it is given a scale"
    assert why["query.weight"] == why["key.weight"] == scales
    assert halved(make(), IMAGES) == [8, 6]
    assert halved(make(scale=0.5), IMAGES) == [8, 6, 7]


def test_an_output_that_is_summed_up_in_place_is_followed() -> None:
    model = Net(lambda m, x: torch.zeros(2, 4).to(x).add_(m.head(m.one(x))), one=conv(3, 8), head=head(8))
    assert halved(model, IMAGES) == [8]


@pytest.mark.parametrize(
    "op",
    [
        lambda m, y: y.unsqueeze_(1).squeeze_(1),
        lambda m, y: y.transpose_(1, 2).transpose(1, 2),
        lambda m, y: y[:, 1:].unsqueeze_(1).squeeze(1),
    ],
    ids=["whole", "turned", "of a part"],
)
def test_a_shape_that_changes_in_place_is_followed(op: Callable[[Any, Tensor], Tensor]) -> None:
    assert halved(of_tokens(op), TOKENS) == [8, 7]


def test_products_of_vectors_are_followed() -> None:
    model = of_tokens(
        lambda m, y: torch.stack([m.square(vector) for row in y for vector in row]),
        square=nn.Linear(8, 8, bias=False),
    )
    assert halved(model, TOKENS) == [8, 7, 8]


def test_rules_are_of_named_ops_and_functions_or_names() -> None:
    for name in ("scale", "::scale", "mylib::"):
        with pytest.raises(ValueError, match=f"^op='{name}' must be a name with its namespace"):
            register_rule(name, "mul")
    with pytest.raises(
        ValueError, match=r"^rule='cdist' must be a function .* name of an op that is pointwise"
    ):
        register_rule("mylib::scale", "cdist")


@pytest.mark.rule_fails
@pytest.mark.parametrize("rule", [lambda call: [], lambda call: [[torch.ones(1, 3, 1)]]], ids=["none", "shape"])
def test_fields_that_do_not_fit_freeze_what_reaches_the_op(rule: Callable[[Any], Any]) -> None:
    register_rule("tests::negative", rule)
    model = of_images(lambda m, y: negative(y))
    assert frozen(model)["one.weight"] == "reaches negative in a form that is not followed"
    register_rule("tests::negative", "neg")
    assert halved(model, IMAGES) == [8, 6]


def test_an_op_that_is_called_as_one_of_pytorch_is_another_one() -> None:
    model = Net(
        lambda m, x: m.out(m.wide((full(m.one(x)) + m.two(x)).relu()).relu()),
        one=conv(3, 6),
        two=conv(3, 6),
        wide=conv(6, 4),
        out=conv(4, 2),
    )
    reasons = frozen(model)
    assert reasons["one.weight"] == "feeds full, which is not followed"
    assert reasons["two.weight"] == (
        "is combined with values that cannot shrink with it, such as an input or a constant"
    )
