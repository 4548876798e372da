"""Heads of attention with masks, between sequences, and after other layers: they go without a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.attention import NarrowAttention
from lightning_prune.channels.compaction.example_variants import variant_that_runs
from lightning_prune.core.probes import as_probe, tensors_in

WIDTH, HEADS, LENGTH, OTHER = 12, 3, 7, 5
_SEED = torch.Generator().manual_seed(0)
TOKENS = torch.randn(2, LENGTH, WIDTH, generator=_SEED)
MEMORY = torch.randn(2, OTHER, WIDTH, generator=_SEED)
PADDING = torch.arange(LENGTH) > torch.tensor([[4], [5]])
MEMORY_PADDING = torch.arange(OTHER) > torch.tensor([[2], [3]])


def later(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)


class Masked(nn.Module):
    """Attention called by a function that is given, and a layer that reads what it returns."""

    def __init__(self, run: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.run, self.heads = run, HEADS
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.run(self, *inputs)[0])
        return result


class Fed(Masked):
    """Attention whose queries, and whose keys and values, layers make that nothing else reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda m, x, y: m.attention(m.first(x), z := m.second(y), z), **options)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, options.get("kdim", WIDTH))


def once(options: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Return a function that calls self-attention with these options, which it is given as well."""
    return lambda m, x, *more: m.attention(x, x, x, **options(m, x, *more))


def per_head(model: Masked, tokens: Tensor) -> Tensor:
    return later(tokens)[None, None].expand(len(tokens), model.heads, -1, -1).flatten(0, 1)


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "padding": (once(lambda m, x, pad: {"key_padding_mask": pad}), (TOKENS, PADDING)),
    "padding, fused": (
        once(lambda m, x, pad: {"key_padding_mask": pad, "need_weights": False}),
        (TOKENS, PADDING),
    ),
    "padding and mask": (
        once(lambda m, x, pad: {"key_padding_mask": pad, "attn_mask": later(x)}),
        (TOKENS, PADDING),
    ),
    "numbers": (
        once(lambda m, x, pad: {"key_padding_mask": -3 * pad.to(x), "attn_mask": -2 * later(x).to(x)}),
        (TOKENS, PADDING),
    ),
    "repeated": (
        once(lambda m, x: {"attn_mask": later(x).repeat(len(x) * m.attention.num_heads, 1, 1)}),
        (TOKENS,),
    ),
    "repeated by a number of its own": (
        once(lambda m, x, pad: {"attn_mask": (pad[:, None] | later(x)).repeat_interleave(m.heads, 0)}),
        (TOKENS, PADDING),
    ),
    "expanded": (once(lambda m, x: {"attn_mask": per_head(m, x)}), (TOKENS,)),
    "causal": (
        once(lambda m, x, mask: {"attn_mask": mask, "is_causal": True, "need_weights": False}),
        (TOKENS, later(TOKENS)),
    ),
    "causal numbers": (
        once(lambda m, x, mask: {"attn_mask": mask, "is_causal": True, "need_weights": False}),
        (TOKENS, nn.Transformer.generate_square_subsequent_mask(LENGTH)),
    ),
    "causal, weights": (
        once(lambda m, x: {"attn_mask": later(x), "is_causal": True}),
        (TOKENS,),
    ),
    "cross": (lambda m, x, y: m.attention(x, y, y), (TOKENS, MEMORY)),
    "cross, padding": (
        lambda m, x, y, pad: m.attention(x, y, y, key_padding_mask=pad),
        (TOKENS, MEMORY, MEMORY_PADDING),
    ),
    "keys and values": (lambda m, x, y: m.attention(x, y, y + 1), (TOKENS, MEMORY)),
}


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.double() if each.is_floating_point() else each for each in tensors)


def halved(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Pruner, nn.Module]:
    """Return the pruner of a model, and a copy without a third of all units, whose outputs are the same."""
    pruner = Pruner(model, 0.34, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, example)
    with torch.no_grad():
        expected, found = model(*example), smaller(*example)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    return pruner, smaller


@pytest.mark.parametrize(("run", "example"), CASES.values(), ids=CASES)
def test_heads_go_whatever_masks_attention_has(run: Callable[..., Any], example: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    model = Masked(run).double().eval()
    pruner, smaller = halved(model, double(example))
    assert [group.size for group in pruner.groups if group.heads] == [HEADS]
    assert type(smaller.attention) is NarrowAttention
    assert smaller.attention.num_heads == HEADS - 1
    assert smaller.attention.in_proj_weight.shape == (3 * 8, WIDTH)


def test_a_mask_for_each_head_that_is_an_input_keeps_the_heads() -> None:
    torch.manual_seed(0)
    run = once(lambda m, x, mask: {"attn_mask": mask})
    example = double((TOKENS, later(TOKENS).repeat(2 * HEADS, 1, 1)))
    pruner, _ = halved(Masked(run).double().eval(), example)
    assert not any(group.heads for group in pruner.groups)


def test_a_mask_for_heads_that_are_gone_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Masked(once(lambda m, x: {}))).double().eval()
    _, smaller = halved(model, double((TOKENS,)))
    with pytest.raises(ValueError, match=r"attn_mask has 6 masks; .* 2 heads, .* 2 sequences: give 4 masks"):
        smaller[0].attention(*[TOKENS.double()] * 3, attn_mask=later(TOKENS).repeat(6, 1, 1))


@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 8}], ids=str)
def test_layers_that_attention_alone_reads_go(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    _, smaller = halved(Fed(**options).double().eval(), double((TOKENS, MEMORY)))
    attention = smaller.attention
    assert (attention.embed_dim, attention.num_heads) == (8, 2)
    if options:
        assert (attention.kdim, attention.vdim) == (5, 5)
        assert [each.shape for each in (attention.q_proj_weight, attention.k_proj_weight)] == [(8, 8), (8, 5)]
    else:
        assert attention.in_proj_weight.shape == (3 * 8, 8)
    smaller.train()(*double((TOKENS, MEMORY))).sum().backward()


class Queries(nn.Module):
    """Queries that are learned attend to each other, and then to a sequence, as in DETR."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.queries, self.batch_first = nn.Parameter(torch.randn(5, WIDTH)), batch_first
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 10, batch_first=batch_first)
        self.layers, self.head = nn.TransformerDecoder(layer, 1), nn.Linear(WIDTH, 4)

    def forward(self, memory: Tensor) -> Tensor:
        if self.batch_first:
            decoded = self.layers(self.queries.expand(len(memory), -1, -1), memory)
        else:
            queries = self.queries[:, None].repeat(1, len(memory), 1)
            decoded = self.layers(queries, memory.transpose(0, 1)).transpose(0, 1)
        result: Tensor = self.head(decoded)
        return result


@pytest.mark.parametrize("batch_first", [False, True])
def test_heads_of_learned_queries_go(batch_first: bool) -> None:
    torch.manual_seed(0)
    pruner, smaller = halved(Queries(batch_first).double().eval(), double((MEMORY,)))
    heads = {group.name: group for group in pruner.groups if group.heads}
    assert {name: group.size for name, group in heads.items()} == {
        "layers.layers.0.self_attn": HEADS,
        "layers.layers.0.multihead_attn": HEADS,
    }
    for group in heads.values():  # the bias makes the head, as the weight does, and reads nothing
        assert [part.name.rpartition(".")[2] for part in group.slices] == ["in_proj_weight", "in_proj_bias"]
    attentions = [each for each in smaller.modules() if isinstance(each, nn.MultiheadAttention)]
    assert [each.num_heads for each in attentions] == [HEADS - 1] * 2


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(WIDTH, 4, 1, 1, 10, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        decoded = self.layers(
            source,
            target,
            tgt_mask=later(target),
            src_key_padding_mask=source_padding,
            memory_key_padding_mask=source_padding,
            tgt_key_padding_mask=target_padding,
        )
        result: Tensor = self.head(decoded)
        return result


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_heads_of_a_transformer_with_all_its_masks_go() -> None:
    torch.manual_seed(0)
    model = Translator().double().eval()
    pruner, smaller = halved(model, double((MEMORY, TOKENS, MEMORY_PADDING, PADDING)))
    assert {group.name: group.size for group in pruner.groups} == {
        "layers.encoder.layers.0.self_attn": 4,
        "layers.encoder.layers.0.linear1": 10,
        "layers.decoder.layers.0.self_attn": 4,
        "layers.decoder.layers.0.multihead_attn": 4,
        "layers.decoder.layers.0.linear1": 10,
    }
    attentions = [each for each in smaller.modules() if isinstance(each, nn.MultiheadAttention)]
    assert [each.num_heads for each in attentions] == [3] * 3


class Causal(nn.Module):
    """Causal attention that hides padding by the least number, with a softmax in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.size = WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor, attended: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        hidden = (attended == 0)[:, None, None] | later(tokens)
        scores = (query @ key.transpose(-1, -2)).masked_fill(hidden, torch.finfo(query.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return self.head((weights @ value).transpose(1, 2).flatten(2))


def test_padding_in_integers_stays_at_the_end() -> None:
    """With a hidden first position nothing would be left of it in double precision: 0 / 0."""
    torch.manual_seed(0)
    attended = (~PADDING).long()
    pruner, _ = halved(Causal().double().eval(), (TOKENS.double(), attended))
    assert {group.name: group.size for group in pruner.groups} == {"query": HEADS}
    variant = variant_that_runs(as_probe((TOKENS, attended)), lambda probe: True)
    assert variant is not None
    assert all(tensors_in(variant)[1][:, 0] == 1)


def test_a_causal_mask_of_another_length_is_causal() -> None:
    variant = variant_that_runs(as_probe(later(TOKENS)), lambda probe: True)
    assert variant is not None
    (mask,) = tensors_in(variant)
    assert torch.equal(mask, torch.ones(LENGTH + 1, LENGTH + 1, dtype=torch.bool).triu(1))


def test_what_the_larger_network_alone_cannot_run_is_no_crash() -> None:
    """Float masks beside doubles: plain attention refuses them, the narrow one casts."""
    torch.manual_seed(0)
    run = once(lambda m, x, pad: {"key_padding_mask": -3.0 * pad})
    model = Masked(run).eval()
    pruner = Pruner(
        model, 0.34, structure=Channels(), selector=PerLayer(), schedule=None, example=(TOKENS, PADDING)
    )
    assert [group.size for group in pruner.groups if group.heads] == [HEADS]
