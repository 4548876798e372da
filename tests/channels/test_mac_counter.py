"""Multiply-adds by parameter, against counts by hand and those of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks_by_coupling import IMAGES, flat, plain, residual
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import Channels, Global, PerLayer, Pruner, Unstructured, measure
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.channels.graph.products import products
from lightning_prune.core.probes import math_attention
from lightning_prune.structures.base import Structure


class Tokens(nn.Module):
    """Adds a position to each of 8 tokens of 16 numbers, then attends."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(8, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        placed = tokens + self.position
        return self.head(self.attention(placed, placed, placed)[0].mean(1))


class Words(nn.Module):
    """Has one tensor as an embedding, as a decoder and, transposed, as a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.decode = nn.Linear(6, 20)
        self.decode.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.decode(self.decode(self.embed(words)) @ self.embed.weight)


class Reader(nn.Module):
    """Reads sequences of 3 numbers with a recurrent layer."""

    def __init__(self, cls: Any, **options: Any) -> None:
        super().__init__()
        self.layer = cls(3, 8, **options)

    def forward(self, sequences: Any) -> Any:
        return self.layer(sequences)[0]


TOKENS, WORDS = torch.randn(2, 8, 16), torch.zeros(5, dtype=torch.int64)
ATTENTION = {
    "": 2 * 2 * 8 * 8 * 16,
    "attention.in_proj_weight": 2 * 8 * 16 * 48,
    "attention.out_proj.weight": 2 * 8 * 16 * 16,
    "head.weight": 2 * 16 * 10,
}


def torch_counts(model: nn.Module, example: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math_attention():
        model(example)
    return counter.get_total_flops() // 2


def test_each_parameter_counts_its_own_products() -> None:
    assert macs_by_parameter(Tokens(), TOKENS) == ATTENTION
    assert macs_by_parameter(Words(), WORDS) == {"": 0, "embed.weight": 3 * 5 * 6 * 20}


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Tokens(), TOKENS),
        (Words(), WORDS),
        *((make(), IMAGES) for make in (flat, plain, residual)),
        (nn.ConvTranspose2d(3, 6, 3, groups=3), IMAGES),
    ],
)
def test_all_are_half_of_what_torch_counts(model: nn.Module, example: Any) -> None:
    assert sum(macs_by_parameter(model.eval(), example).values()) == torch_counts(model, example) > 0


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "bidirectional": True, "bias": False},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_count_by_matrix(cls: Any, options: dict[str, Any], packed: bool) -> None:
    model, sequences, positions = Reader(cls, **options), torch.randn(4, 4, 3), 16
    if packed:
        lengths, positions = [4, 2, 2, 1], 9
        sequences = pack_padded_sequence(sequences, lengths, batch_first=options.get("batch_first", False))
    matrices = {name: each for name, each in model.named_parameters() if each.ndim == 2}
    expected = {name: each.numel() * positions for name, each in matrices.items()}
    assert len(expected) == 2 * options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert macs_by_parameter(model, (sequences,)) == {"": 0, **expected}


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_projections_of_recurrent_layers_count() -> None:
    model = Reader(nn.LSTM, proj_size=2, num_layers=2)
    sizes = {name: each.numel() for name, each in model.named_parameters() if each.ndim == 2}
    assert "layer.weight_hr_l1" in sizes
    assert macs_by_parameter(model, torch.randn(5, 2, 3)) == {
        "": 0,
        **{name: 10 * size for name, size in sizes.items()},
    }


@pytest.mark.parametrize("shape", [(5, 2, 3), (10, 3)])
def test_recurrent_kernels_of_accelerators_count_by_matrix(shape: tuple[int, ...]) -> None:
    model = nn.LSTM(3, 8, num_layers=2)
    args = (torch.randn(shape), list(model.parameters()), 4, None, torch.zeros(2, 2, 8))
    found = products(torch.ops.aten._cudnn_rnn.default, args, {}, ())
    matrices = [each for each in model.parameters() if each.ndim == 2]
    assert [macs for macs, _ in found] == [10 * each.numel() for each in matrices]
    assert all(factor is each for (_, (factor,)), each in zip(found, matrices, strict=True))


class Computed(nn.Module):
    """Multiplies its inputs by what a function makes of a 6 x 6 parameter, another one and a buffer."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.register_buffer("fixed", torch.ones(6, 6))
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, self.one, self.other, self.fixed)


def overwritten(inputs: Tensor, one: Tensor, other: Tensor, fixed: Tensor) -> Tensor:
    mixed = one.clone()
    mixed[:2] = inputs
    return inputs @ mixed


def filled(inputs: Tensor, one: Tensor, other: Tensor, fixed: Tensor) -> Tensor:
    both = torch.zeros(6, 6)
    both[:3], both[3:] = one[:3], other[3:]
    return inputs @ both


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda inputs, one, other, fixed: inputs @ (one * fixed).t().contiguous(), {"": 0, "one": 72}),
        (lambda inputs, one, other, fixed: inputs @ (one + other), {"": 72}),
        (lambda inputs, one, other, fixed: inputs @ fixed, {"": 72}),
        (lambda inputs, one, other, fixed: inputs @ (one @ fixed), {"": 0, "one": 216 + 72}),
        (lambda inputs, one, other, fixed: inputs @ (one @ other), {"": 216 + 72}),
        (lambda inputs, one, other, fixed: inputs @ one @ other, {"": 0, "one": 72, "other": 72}),
        (lambda inputs, one, other, fixed: (inputs + one[:2]) @ other, {"": 0, "other": 72}),
        (lambda inputs, one, other, fixed: inputs @ inputs.t(), {"": 24}),
        (overwritten, {"": 72}),
        (filled, {"": 72}),
    ],
)
def test_what_several_parameters_make_counts_for_none(
    function: Callable[..., Tensor], expected: dict[str, int]
) -> None:
    assert macs_by_parameter(Computed(function), torch.randn(2, 6)) == expected


def test_a_weight_with_its_norm_apart_counts_for_none_and_in_all() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert macs_by_parameter(model, torch.ones(1, 4)) == {"": 12, "1.weight": 6}


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    macs_by_parameter(model, IMAGES)
    assert model.training
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("model", "example", "include"),
    [
        (Tokens(), TOKENS[:1], "*"),
        (Tokens(), TOKENS[:1], "position"),
        (Tokens(), TOKENS[:1], ("position", "attention.in_proj_weight")),
        (Reader(nn.LSTM, num_layers=2, bidirectional=True), torch.randn(1, 1, 3), "*"),
        (Reader(nn.GRU), torch.randn(1, 1, 3), "*"),
    ],
)
def test_the_report_subtracts_what_each_parameter_lost(model: nn.Module, example: Tensor, include: Any) -> None:
    structure = Unstructured(include=include)
    pruner = Pruner(model, 0.75, structure=structure, selector=PerLayer(), schedule=None)
    pruner.prune(1.0)
    counts = macs_by_parameter(model, example)
    lost = sum(counts.get(name, 0) * int((~mask).sum()) // mask.numel() for name, mask in pruner.masks.items())
    report = measure(model, pruner.masks, example)
    assert report.macs == sum(counts.values())
    assert report.macs_kept == report.macs - lost
    assert (lost == 0) == (include == "position")


@pytest.mark.parametrize("model", [Tokens(), Reader(nn.LSTM, num_layers=2)])
def test_a_budget_is_met_in_the_report(model: nn.Module) -> None:
    example = TOKENS[:1] if isinstance(model, Tokens) else torch.randn(1, 1, 3)
    structure = Unstructured(include="*")
    pruner = Pruner(model, 0.5, structure=structure, selector=Global("macs"), schedule=None, example=example)
    pruner.prune(1.0)
    report = measure(model, pruner.masks, example)
    assert report.macs_kept is not None
    assert report.macs is not None
    assert abs(report.macs_kept - report.macs // 2) <= 8


@pytest.mark.parametrize("structure", [Channels(), Unstructured()])
def test_budgets_of_all_structures_hold_recurrent_layers(structure: Structure) -> None:
    class Tagger(Reader):
        def __init__(self) -> None:
            super().__init__(nn.LSTM, batch_first=True)
            self.wide, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, sequences: Any) -> Any:
            return self.head(self.wide(super().forward(sequences)).relu())

    units = structure.units(Tagger(), torch.randn(1, 4, 3))
    assert units.budgets["macs"].total == 4 * (32 * 3 + 32 * 8 + 8 * 6 + 6 * 2)
