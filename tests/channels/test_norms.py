"""What a norm normalises over goes, and the norm goes on with the statistics of all channels."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit, fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, OneShot, PerLayer, Pruner, PruningCallback, compact, load_compact
from lightning_prune.channels.compaction.replay import expand_
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.core.probes import as_probe

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """Attention and a gated layer, each with a norm before it, as in Llama."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.size = 4
        self.first, self.second = norm(width), norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first(x)
        q, k, v = (
            each(seen).unflatten(-1, (-1, self.size)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        seen = self.second(x)
        return x + self.down(F.silu(self.gate(seen)) * self.up(seen))


class LanguageModel(nn.Module):
    """Embeddings, learned positions if asked for, blocks, and a head that shares its weight with the first."""

    def __init__(self, norm: Callable[[int], nn.Module], positions: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(9, 16)) if positions else None
        self.blocks = nn.Sequential(Block(16, norm), Block(16, norm))
        self.norm = norm(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        if self.positions is not None:
            x = x + self.positions[: words.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class RootMeanSquare(nn.Module):
    """As in T5, and with an offset as in Gemma."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset, self.variance_epsilon = nn.Parameter(torch.ones(width)), offset, 0.01

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        normed = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.offset + self.weight) * normed


class SinglePrecision(RootMeanSquare):
    """As in Llama."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class ByFunction(nn.Module):
    """As in nanoGPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Scale(nn.Module):
    """One weight a channel, and no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def rows(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    return nn.Sequential(nn.Linear(6, 16), stack, nn.Linear(16, 3))


def vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def uneven(model: nn.Module) -> nn.Module:
    """Norms and biases as after training: none of them is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    return model.double().eval()


def pruned(make: Callable[[], nn.Module], example: Any) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    model = uneven(make())
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    return model, pruner


CASES = {
    "layer norm": (lambda: rows(nn.LayerNorm), TOKENS, {"0": 8, "2": 10}),
    "without a shift": (lambda: rows(lambda n: nn.LayerNorm(n, bias=False)), TOKENS, {"0": 8, "2": 10}),
    "rms norm": (lambda: rows(nn.RMSNorm), TOKENS, {"0": 8, "2": 10}),
    "rms norm with an epsilon": (lambda: rows(lambda n: nn.RMSNorm(n, 0.3)), TOKENS, {"0": 8, "2": 10}),
    "encoder": (
        lambda: encoder(False),
        TOKENS,
        {"0": 16}
        | {f"1.layers.{n}.{name}": size for n in (0, 1) for name, size in (("self_attn", 4), ("linear1", 32))},
    ),
    "encoder with norms first": (
        lambda: encoder(True),
        TOKENS,
        {"0": 16}
        | {f"1.layers.{n}.{name}": size for n in (0, 1) for name, size in (("self_attn", 4), ("linear1", 32))},
    ),
    "as GPT": (
        lambda: LanguageModel(nn.LayerNorm, positions=True),
        WORDS,
        {"blocks.0.out": 16}
        | {f"blocks.{n}.{name}": size for n in (0, 1) for name, size in (("q", 4), ("gate", 24))},
    ),
    "as Llama": (
        lambda: LanguageModel(nn.RMSNorm),
        WORDS,
        {"blocks.0.out": 16}
        | {f"blocks.{n}.{name}": size for n in (0, 1) for name, size in (("q", 4), ("gate", 24))},
    ),
    "vision transformer": (
        vit,
        IMAGES,
        {"conv_proj": 16}
        | {
            f"encoder.layers.encoder_layer_{n}.{name}": size
            for n in (0, 1)
            for name, size in (("self_attention", 2), ("mlp.0", 32))
        },
    ),
}


@pytest.mark.parametrize(("make", "example", "sizes"), CASES.values(), ids=CASES)
def test_half_of_the_width_goes_and_outputs_are_those_of_the_masked_network(
    make: Callable[[], nn.Module], example: Tensor, sizes: dict[str, int]
) -> None:
    model, pruner = pruned(make, example)
    assert {group.name: group.size for group in pruner.groups} == sizes
    small = compact(model, pruner.masks, example)
    norms = [module for module in small.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
    for norm, before in zip(
        norms, (each for each in model.modules() if type(each) in (nn.LayerNorm, nn.RMSNorm)), strict=True
    ):
        assert len(norm.weight) == len(before.weight) // 2
        assert norm.normalized_shape == before.normalized_shape  # what the statistics are of
    for training in (False, True):
        with torch.no_grad():  # in evaluation mode encoders would run their fused op
            expected, found = (each.train(training)(example) for each in (model, small))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    small(example).square().mean().backward()
    assert all(bool(parameter.grad.count_nonzero()) for parameter in small.parameters())


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["as T5", "as Gemma"])
def test_a_root_mean_square_of_your_own_counts_the_channels_that_went(offset: float) -> None:
    model, pruner = pruned(lambda: LanguageModel(partial(RootMeanSquare, offset=offset)), WORDS)
    assert {group.name: group.size for group in pruner.groups} == CASES["as Llama"][2]
    small = compact(model, pruner.masks, WORDS)
    assert [len(module.weight) for module in small.modules() if isinstance(module, RootMeanSquare)] == [8] * 5
    with torch.no_grad():
        torch.testing.assert_close(small(WORDS), model(WORDS), rtol=1e-12, atol=1e-12)
    again = Pruner(small, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=WORDS)
    again.prune(1.0)
    least = compact(small, again.masks, WORDS)
    with torch.no_grad():
        torch.testing.assert_close(least(WORDS), small(WORDS), rtol=1e-12, atol=1e-12)
    assert len(least.norm.weight) == 4


def test_a_root_mean_square_in_single_precision_is_right_to_its_rounding_errors() -> None:
    model, pruner = pruned(lambda: LanguageModel(SinglePrecision), WORDS)
    small = compact(model, pruner.masks, WORDS)
    assert len(small.norm.weight) == 8
    with torch.no_grad():
        torch.testing.assert_close(small(WORDS), model(WORDS), rtol=1e-5, atol=1e-5)


def test_dense_shapes_come_back_without_a_trace() -> None:
    for norm in (nn.LayerNorm, RootMeanSquare, ByFunction):
        model, pruner = pruned(lambda norm=norm: rows(norm), TOKENS)
        small = copy.deepcopy(model)
        plan = compact_(small, pruner.masks, None, as_probe(TOKENS)).plan
        expand_(small, plan)
        assert type(small[1]) is norm
        assert not small[1]._forward_hooks
        assert not small[1]._forward_pre_hooks
        assert torch.equal(small(TOKENS), model(TOKENS))


def test_a_scale_is_no_norm() -> None:
    model, pruner = pruned(lambda: rows(Scale), TOKENS)
    assert not compact(model, pruner.masks, TOKENS)[1]._forward_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_batch_with_padding_goes_through_an_encoder_as_a_nested_tensor() -> None:
    model, pruner = pruned(lambda: encoder(False), TOKENS)
    small = compact(model, pruner.masks, TOKENS)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    found = []
    for each in (model, small):
        with torch.no_grad():
            found.append(each[1](each[0](TOKENS), src_key_padding_mask=padding)[~padding])
    rows = pruner.masks["1.layers.1.norm2.weight"]
    torch.testing.assert_close(found[1], found[0][:, rows], rtol=1e-12, atol=1e-12)


def test_a_smaller_network_is_pruned_again_and_counts_the_channels_of_the_first() -> None:
    for norm in (nn.LayerNorm, nn.RMSNorm):
        model, pruner = pruned(lambda norm=norm: rows(norm), TOKENS)
        small = compact(model, pruner.masks, TOKENS)
        again = Pruner(small, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=TOKENS)
        assert [group.size for group in again.groups] == [4, 5]
        again.prune(1.0)
        least = compact(small, again.masks, TOKENS)
        assert (len(least[1].weight), least[1].normalized_shape) == (2, (8,))
        torch.testing.assert_close(least(TOKENS), small(TOKENS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_narrow_types_are_summed_in_single_precision(norm: type[nn.Module]) -> None:
    model, pruner = pruned(lambda: rows(norm), TOKENS)
    small = compact(model, pruner.masks, TOKENS)
    for dtype in (torch.bfloat16, torch.float16):
        norms = [copy.deepcopy(each)[1].to(dtype) for each in (model, small)]
        kept = pruner.masks["1.weight"]
        large = torch.zeros(4, 8, dtype=dtype)
        large[:, kept] = 300 + torch.randn(4, 4).to(dtype)  # whose squares float16 does not hold
        expected, found = norms[0](large)[:, kept], norms[1](large[:, kept])
        assert found.dtype is dtype
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_narrow_norm_runs_under_autocast() -> None:
    model, pruner = pruned(lambda: rows(nn.LayerNorm), TOKENS)
    small = compact(model, pruner.masks, TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (each.float()[:2](TOKENS.float()) for each in (model, small))
    expected = expected.float()[..., pruner.masks["1.weight"]]  # on the CPU it is in bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_a_channel_that_no_layer_reads_stays_while_the_norm_counts_it() -> None:
    torch.manual_seed(0)
    model = uneven(rows(nn.LayerNorm))
    mask = torch.ones(10, 8, dtype=torch.bool)
    mask[:, 3] = False
    small = compact(model, {"2.weight": mask}, TOKENS)
    assert small[0].out_features == 8


# --- what stays, and why


class Sines(nn.Module):
    """Adds positions that nothing masks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(5.0 * width).view(5, width).sin())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (
            lambda n: nn.LayerNorm(n, elementwise_affine=False),
            "feeds a layer_norm, which mixes all channels (in 1)",
        ),
        (lambda n: nn.RMSNorm(n, elementwise_affine=False), "feeds mean, which mixes all channels (in 1)"),
        (lambda n: nn.LayerNorm((5, n)), "feeds a layer_norm, which mixes all channels (in 1)"),
        (lambda n: nn.Sequential(nn.Sigmoid(), nn.LayerNorm(n)), "cannot be cut: outputs change by"),
        (lambda n: nn.Sequential(Sines(n), nn.LayerNorm(n)), "cannot be cut: outputs change by"),
    ],
    ids=[
        "without a weight",
        "rms norm without a weight",
        "over two dimensions",
        "of what is not 0",
        "of sines",
    ],
)
def test_what_a_norm_cannot_do_without_stays(norm: Callable[[int], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    units = Channels().units(rows(norm).double(), TOKENS)
    assert [(group.name, group.size) for group in units.groups] == [("2", 10)]
    assert units.frozen["0.weight"].startswith(reason)


# --- in a fit


class Mixer(Lit):
    """The rows of the digits as tokens."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, 1e-3))
        self.net = nn.Sequential(
            nn.Flatten(1, 2), nn.Linear(8, 16), norm(16), nn.GELU(), nn.Flatten(), nn.Linear(128, 10)
        )


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RootMeanSquare, ByFunction])
def test_a_fit_shrinks_norms_and_their_optimizer_state_and_its_checkpoint_loads(
    tmp_path: Path, norm: Callable[[int], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = Mixer(norm)
    pruning = PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    run = fit(tmp_path, model, pruning, max_epochs=2)
    assert len(model.net[2].weight) == 8
    (optimizer,) = run.optimizers
    assert {state["exp_avg"].shape for state in optimizer.state.values()} == {
        each.shape for each in model.parameters()
    }
    run.save_checkpoint(tmp_path / "small.ckpt")
    images = torch.randn(4, 1, 8, 8)
    loaded = load_compact(tmp_path / "small.ckpt", Mixer(norm)).eval()
    assert torch.equal(loaded(images), model.eval()(images))
    stored = io.BytesIO()
    torch.save(model.net, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(images), model(images))
