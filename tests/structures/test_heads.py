"""Attention heads: found by what is computed, however attention is written, and cut without a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, Heads, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.attention import NarrowAttention

WIDTH, HEADS, SIZE = 12, 3, 4
TOKENS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """One projection makes queries, keys and values, as in timm."""

    def __init__(self, fused_kernel: bool, norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = HEADS, SIZE, SIZE**-0.5
        self.fused_kernel = fused_kernel
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm: nn.Module = nn.LayerNorm(SIZE) if norm else nn.Identity()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = self.q_norm(q)
        if self.fused_kernel:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class Separate(nn.Module):
    """A projection each, as in transformers; the width of all heads is an attribute, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, SIZE, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dense = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = F.dropout((q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1), 0.1, self.training)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous()
        return self.dense(y.view(*y.shape[:-2], self.all_head_size))


class Windowed(nn.Module):
    """Windows of a shifted sequence, a learned bias for each distance and head, cosine similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.logit_scale = nn.Parameter(torch.randn(HEADS, 1, 1))
        place = torch.arange(5)
        self.register_buffer("distance", (place[:, None] - place + 4).flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        windows = torch.roll(torch.cat([x, x.flip(1)], 1), -2, 1).view(batch * 2, 5, WIDTH)
        q, k, v = self.to_qkv(windows).chunk(3, dim=-1)
        q, k, v = (part.reshape(batch * 2, 5, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.logit_scale.clamp(max=4).exp()
        bias = self.table[self.distance].view(5, 5, -1).permute(2, 0, 1)
        hidden = torch.zeros(2, 5, 5, dtype=x.dtype).index_fill_(0, torch.tensor([1]), -1.0)
        scores = (scores + bias).view(batch, 2, self.heads, 5, 5) + hidden[:, None]
        y = scores.view(-1, self.heads, 5, 5).softmax(-1) @ v
        y = self.to_out(y.transpose(1, 2).flatten(2))
        return torch.roll(y.view(batch, 10, WIDTH), 2, 1)[:, :5]


class Free(nn.Module):
    """Keeps the head size alone: the number of heads follows from the tensors. Einstein sums, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.q = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, -1, SIZE)).unbind(2)
        q = self.q(x).unflatten(-1, (-1, SIZE))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


class Plain(nn.Module):
    """``nn.MultiheadAttention``, called as most do: it averages the weights of its heads, for nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=10, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: Fused(fused_kernel=False),
    "fused kernel": lambda: Fused(fused_kernel=True),
    "fused with norms": lambda: Fused(fused_kernel=True, norm=True),
    "separate": Separate,
    "windowed": Windowed,
    "free": Free,
    "plain": Plain,
    "plain without bias": lambda: Plain(bias=False),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Residual(make()), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)).double().eval()


@torch.no_grad()
def outputs(model: nn.Module, example: Tensor = TOKENS) -> Tensor:
    result: Tensor = model(example.double())
    return result


@ALL
def test_each_head_is_a_unit(make: Callable[[], nn.Module]) -> None:
    (group,) = Heads().units(build(make), TOKENS.double()).groups
    assert (group.size, group.heads) == (HEADS, True)
    rows = sum(int((part.index == 0).sum()) for part in group.slices if part.dim == 0 and part.weight.ndim == 2)
    assert rows == 3 * SIZE  # of queries, keys and values


@ALL
def test_a_head_is_masked_and_cut_out_whole(make: Callable[[], nn.Module]) -> None:
    model = build(make)
    pruner = Pruner(model, 1 / 3, structure=Heads(), schedule=None, example=TOKENS.double())
    dense = outputs(model)
    pruner.prune(1.0)
    assert pruner.sparsity == pytest.approx(1 / 3)
    masked = outputs(model)
    smaller = compact(model, pruner.masks, TOKENS.double())
    assert not torch.allclose(dense, masked)
    assert (outputs(smaller) - masked).abs().max() <= 1e-12 * masked.abs().max()
    rows = sum(p.shape[0] for p in model[0].inner.parameters() if p.ndim == 2)
    left = sum(p.shape[0] for p in smaller[0].inner.parameters() if p.ndim == 2)
    assert rows - left == 3 * SIZE
    (group,) = Heads().units(smaller, TOKENS.double()).groups
    assert group.size == HEADS - 1


def test_channels_takes_heads_and_neurons() -> None:
    model = encoder()
    found = {group.name: group.size for group in Channels().units(model, TOKENS).groups}
    assert found == {
        "layers.0.self_attn": 3,
        "layers.1.self_attn": 3,
        "layers.0.linear1": 10,
        "layers.1.linear1": 10,
    }
    assert [group.name for group in Heads(exclude="layers.0").units(model, TOKENS).groups] == [
        "layers.1.self_attn"
    ]


def test_a_transformer_encoder_is_cut_and_trained_on() -> None:
    model = encoder()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=TOKENS)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, TOKENS)
    attention = smaller.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (1, SIZE, WIDTH)
    assert attention.in_proj_weight.shape == (3 * SIZE, WIDTH)
    model.eval(), smaller.eval()
    torch.testing.assert_close(smaller(TOKENS), model(TOKENS))
    with torch.inference_mode():  # where torch would take its fused path
        torch.testing.assert_close(smaller(TOKENS), model(TOKENS))
    smaller.train()(TOKENS).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_embedding_that_shrinks_as_its_heads_do_leaves_plain_attention(
    batch_first: bool, bias: bool
) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
            self.attention = nn.MultiheadAttention(32, 8, bias=bias, batch_first=batch_first)

        def forward(self, tokens: Tensor) -> Tensor:
            embedded = self.embedding(tokens)
            return self.head((embedded + self.attention(embedded, embedded, embedded)[0]).mean(1))

    torch.manual_seed(0)
    model, tokens = Embedded().eval(), torch.randn(4, 6, 8)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=tokens)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, tokens)
    assert smaller.attention.in_proj_weight.shape == (48, 16)
    assert type(smaller.attention) is nn.MultiheadAttention
    torch.testing.assert_close(smaller(tokens), model(tokens))
    with torch.inference_mode():
        torch.testing.assert_close(smaller(tokens), model(tokens))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}], ids=str)
def test_narrow_attention_gives_what_the_masked_one_gives(
    batch_first: bool, single: bool, mask: str, widths: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    wide = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **widths).double().eval()
    query, key, value = (
        torch.randn(2, length, width, dtype=torch.float64)
        for length, width in ((4, WIDTH), (5, widths.get("kdim", WIDTH)), (5, widths.get("vdim", WIDTH)))
    )
    if not batch_first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    example = {"query": query, "key": key, "value": value, "need_weights": False}
    pruner = Pruner(wide, 1 / 3, structure=Heads(), schedule=None, example=example)
    pruner.prune(1.0)
    kept = next(iter(pruner.masks.values())).flatten(1).any(1).view(-1, HEADS, SIZE)[0, :, 0]
    narrow = compact(wide, pruner.masks, example)
    assert type(narrow) is NarrowAttention
    assert type(wide) is nn.MultiheadAttention
    batch = () if single else (2,)
    options: dict[str, Any] = {"key_padding_mask": torch.tensor([False, True, False, False, False])}
    if not single:
        options["key_padding_mask"] = options["key_padding_mask"].expand(2, 5)
    else:
        query, key, value = (tensor.select(0 if batch_first else 1, 0) for tensor in (query, key, value))
    later = torch.ones(4, 5).triu(2)
    own = dict(options)
    if mask == "bool":
        options["attn_mask"] = own["attn_mask"] = later.bool()
    elif mask == "float":
        options["attn_mask"] = own["attn_mask"] = -2.0 * later.double()
        options["key_padding_mask"] = own["key_padding_mask"] = options["key_padding_mask"].double() * -3
    elif mask == "per head":
        each = torch.rand(*batch, HEADS, 4, 5).gt(0.7) & later.bool()
        options["attn_mask"] = each.view(-1, 4, 5)
        own["attn_mask"] = (each[kept] if single else each[:, kept]).reshape(-1, 4, 5)
    for average in (True, False):
        expected, _ = wide(query, key, value, **options)
        found, weights = narrow(query, key, value, **own, average_attn_weights=average)
        torch.testing.assert_close(found, expected)
        assert weights.shape == (*batch, *(() if average else (HEADS - 1,)), 4, 5)
    _, all_weights = wide(query, key, value, **options, average_attn_weights=False)
    torch.testing.assert_close(weights, all_weights[kept] if single else all_weights[:, kept])
    assert narrow(query, key, value, **own, need_weights=False)[1] is None


def test_heads_that_share_one_key_and_value_go() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = HEADS
            self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * SIZE)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            k, v = (
                part[:, None].expand(-1, self.heads, -1, -1).reshape(len(x), self.heads, -1, SIZE)
                for part in self.kv(x).chunk(2, -1)
            )
            q = self.q(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
            result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return result

    model = build(Shared)
    (group,) = Heads().units(model, TOKENS.double()).groups
    assert (group.size, group.heads) == (HEADS, True)
    pruner = Pruner(model, 1 / 3, structure=Heads(), schedule=None, example=TOKENS.double())
    pruner.prune(1.0)
    masked = outputs(model)
    smaller = compact(model, pruner.masks, TOKENS.double())
    assert smaller[0].inner.q.weight.shape == (WIDTH - SIZE, WIDTH)
    assert (outputs(smaller) - masked).abs().max() <= 1e-12 * masked.abs().max()


def test_weights_of_heads_that_are_looked_at_keep_them() -> None:
    class Looked(Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            result: tuple[Tensor, Tensor] = self.attention(x, x, x)
            return result

    with pytest.raises(ValueError, match="finds nothing to prune in Looked"):
        Heads().units(Looked(), TOKENS)


def test_a_number_of_heads_in_forward_keeps_them() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    with pytest.raises(
        ValueError,
        match=r"qkv\.weight: cannot be cut: RuntimeError: shape .*invalid.* \(test_heads\.py:\d+, in forward\)",
    ):
        Heads().units(Literal(), TOKENS)


def test_a_network_without_attention_has_no_heads() -> None:
    with pytest.raises(ValueError, match=r"Heads\(.*\) finds nothing to prune in Sequential. .* 0: is not of"):
        Heads().units(nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, 2)), TOKENS)


def test_heads_whose_size_is_worked_out_of_the_embedding_stay() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="needs torchvision")
    block = swin.SwinTransformerBlockV2(8, 4, window_size=[2, 2], shift_size=[1, 1])
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(128, 3))
    units = Channels().units(model, torch.randn(2, 4, 4, 8))
    assert {group.name: group.size for group in units.groups} == {"0.attn.cpb_mlp.0": 512, "0.mlp.0": 32}
    assert "cannot be cut: RuntimeError: shape" in units.frozen["0.attn.qkv"]
    assert "(swin_transformer.py:" in units.frozen["0.attn.qkv"]


class Written(Fused):
    """The number of heads is in the code, so that channels within heads go alone."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_where_heads_fail_and_channels_go_the_reason_is_that_of_heads() -> None:
    model = nn.Sequential(Residual(Written(fused_kernel=False)), nn.Linear(WIDTH, 2)).eval()
    Pruner(model, 0.5, structure=Channels(), schedule=None, example=TOKENS)
    with pytest.raises(ValueError, match=r"0\.inner\.qkv: cannot be cut: .*test_heads.py:"):
        Pruner(model, 0.5, structure=Heads(), schedule=None, example=TOKENS)


class Fed(nn.Module):
    """One layer makes queries, keys and values, and the units that are fed forward."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.inner = HEADS, 10
        self.all = nn.Linear(WIDTH, 3 * WIDTH + self.inner)
        self.out, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        width = self.heads * SIZE
        *made, units = self.all(x).split([width, width, width, self.inner], -1)
        q, k, v = (part.unflatten(-1, (self.heads, SIZE)).transpose(1, 2) for part in made)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y) + self.down(units.relu())


def test_units_beside_heads_that_go_are_of_another_kind() -> None:
    units = Heads().units(nn.Sequential(Fed(), nn.Linear(WIDTH, 2)), TOKENS)
    assert [(group.name, group.size) for group in units.groups] == [("0.all", HEADS)]
    assert units.frozen["0.all[2]"] == "is not of the kind that Heads prunes"


def _made_first(model: Numbered, x: Tensor) -> list[Tensor]:
    q, k, v = model.query(x), model.key(x), model.value(x)
    return [_split(q, model.query_heads), _split(k, model.key_heads), _split(v, model.value_heads)]


def _made_in_the_loop(model: Numbered, x: Tensor) -> list[Tensor]:
    return [_split(layer(x), heads) for layer, heads in model.projections()]


def _without_modules(model: Numbered, x: Tensor) -> list[Tensor]:
    return [_split(F.linear(x, layer.weight, layer.bias), heads) for layer, heads in model.projections()]


def _split_in_a_loop(model: Numbered, x: Tensor) -> list[Tensor]:
    made = [(layer(x), heads) for layer, heads in model.projections()]
    return [_split(y, heads) for y, heads in made]


def _checked(model: Numbered, x: Tensor) -> list[Tensor]:
    assert model.query_heads == model.key_heads == model.value_heads
    return _made_first(model, x)


def _split(y: Tensor, heads: int) -> Tensor:
    return y.unflatten(-1, (heads, SIZE)).transpose(1, 2)


class Numbered(nn.Module):
    """Queries, keys and values have a number of heads each, and one line reshapes all of them."""

    def __init__(self, made_by: Callable[[Numbered, Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.made_by = made_by
        self.query_heads = self.key_heads = self.value_heads = HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        numbers = self.query_heads, self.key_heads, self.value_heads
        return list(zip((self.query, self.key, self.value), numbers, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        made = self.made_by(self, x)
        return x + self.out(F.scaled_dot_product_attention(*made).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "made_by", [_made_first, _made_in_the_loop, _without_modules, _split_in_a_loop, _checked]
)
def test_numbers_that_one_line_reads_in_turn_shrink_together(
    made_by: Callable[[Numbered, Tensor], list[Tensor]],
) -> None:
    units = Heads().units(nn.Sequential(Numbered(made_by), nn.Linear(WIDTH, 2)), TOKENS)
    (group,) = units.groups
    assert (group.size, group.heads) == (HEADS, True)
    assert group.attributes == tuple(("0", f"{name}_heads") for name in ("query", "key", "value"))


class Fixed(nn.Module):
    """Attention that either keeps its width or takes what it is given, as a truth value says."""

    def __init__(self, keeps_width: bool) -> None:
        super().__init__()
        self.keeps_width, self.heads = keeps_width, HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = [
            layer(x).unflatten(-1, (self.heads, SIZE)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        y = F.scaled_dot_product_attention(*made).transpose(1, 2).flatten(2)
        return x + self.out(y.view(x.shape) if self.keeps_width else y)


def test_blocks_that_differ_in_a_truth_value_are_not_taken_to_be_alike() -> None:
    blocks = [Fixed(keeps_width=place in (0, 3, 5)) for place in range(6)]
    units = Heads().units(nn.Sequential(*blocks, nn.Linear(WIDTH, 2)), TOKENS)
    assert {group.name.partition(".")[0] for group in units.groups} == {"1", "2", "4"}
