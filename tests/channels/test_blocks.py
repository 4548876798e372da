"""Blocks that mix tokens: gating over tokens, scans with a state for each head, and norms with a gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, PerLayer, Pruner, compact

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Gating(nn.Module):
    """As in gMLP: one half gates the other, after a layer over tokens, which may be a convolution."""

    def __init__(self, over_tokens: nn.Module) -> None:
        super().__init__()
        self.wide, self.norm, self.over_tokens, self.narrow = (
            nn.Linear(6, 16),
            nn.LayerNorm(8),
            over_tokens,
            nn.Linear(8, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.gelu(self.wide(x)).chunk(2, -1)
        right = self.norm(right)
        if isinstance(self.over_tokens, nn.Linear):
            right = self.over_tokens(right.mT).mT
        else:
            right = self.over_tokens(right)
        result: Tensor = x + self.narrow(left * right)
        return result


class GatedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class Scan(nn.Module):
    """As in Mamba-2: one layer makes gates, channels, what they are read and written by, and steps of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.heads, self.state, self.size = 24, 6, 5, 4
        self.widths = [24, 24 + 2 * 5, 6]
        self.into, self.out = nn.Linear(6, sum(self.widths), bias=False), nn.Linear(24, 6)
        self.near = nn.Conv1d(34, 34, 3, groups=34, padding=2)
        self.decay, self.skip = nn.Parameter(torch.rand(6)), nn.Parameter(torch.ones(6))
        self.norm = GatedNorm(24)

    def forward(self, tokens: Tensor) -> Tensor:
        widths = [self.inner, self.inner + 2 * self.state, self.heads]
        gate, mixed, steps = self.into(tokens).split(widths, -1)
        mixed = F.silu(self.near(mixed.mT)[..., : tokens.shape[1]].mT)
        x, write, read = mixed.split([self.inner, self.state, self.state], -1)
        x, steps = x.unflatten(-1, (self.heads, self.size)), F.softplus(steps)
        state = x.new_zeros(len(x), self.heads, self.size, self.state)
        found = []
        for place in range(tokens.shape[1]):
            step = steps[:, place, :, None, None]
            state = state * (-step * self.decay[:, None, None]).exp()
            state = state + step * x[:, place, ..., None] * write[:, place, None, None]
            found.append((state * read[:, place, None, None]).sum(-1))
        made = torch.stack(found, 1) + x * self.skip[:, None]
        result: Tensor = tokens + self.out(self.norm(made.flatten(2), gate))
        return result


BLOCKS = {
    "gating, linear": (lambda: Gating(nn.Linear(5, 5)), {"0": 6, "1.wide": 8}),
    "gating, convolution": (lambda: Gating(nn.Conv1d(5, 5, 1)), {"0": 6, "1.wide": 8}),
    "scan": (Scan, {"0": 6, "1.into": 4, "1.into[2]": 5}),
}


@pytest.mark.parametrize(("block", "sizes"), BLOCKS.values(), ids=BLOCKS)
def test_units_of_a_block_go_and_outputs_are_those_of_the_masked_network(
    block: Callable[[], nn.Module], sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), block(), nn.Linear(6, 3)).double()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=TOKENS)
    assert {group.name: group.size for group in pruner.groups} == sizes
    pruner.prune(1.0)
    small = compact(model, pruner.masks, TOKENS)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)
    assert [small[0].out_features, small[2].in_features] == [3, 3]
