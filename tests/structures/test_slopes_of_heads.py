"""Values that a network has for each of its heads: heads go with those that are kept in a buffer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, Heads, Pruner, compact

WIDTH, HEADS = 12, 3
TOKENS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Sloped(nn.Module):
    """Each head looks back with a slope of its own, as with ALiBi; slopes are worked out, or in a buffer."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.slopes = nn.Buffer(slopes(HEADS)) if kept else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)
        )
        slope = slopes(self.num_heads) if self.slopes is None else self.slopes
        bias = slope[:, None, None].to(x) * torch.arange(x.shape[1])
        y = ((q @ k.transpose(-2, -1)) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def slopes(heads: int) -> Tensor:
    return 2.0 ** -torch.arange(1, heads + 1)


def test_slopes_that_are_worked_out_keep_heads_and_those_in_a_buffer_go_with_them() -> None:
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), Sloped(kept=False), nn.Linear(WIDTH, 2))
    line = Sloped.forward.__code__.co_firstlineno + 5
    why = (
        "is combined with values that cannot shrink with it, such as an input or a constant: made for all heads"
        f" in forward, test_slopes_of_heads.py:{line}; let what it has for each head come from a buffer (in 1)"
    )
    assert Channels().units(made, TOKENS).failed_heads["1.qkv.weight"] == why
    with pytest.raises(ValueError, match=r"made for all heads in forward, test_slopes_of_heads\.py"):
        Heads().units(made, TOKENS)
    kept = nn.Sequential(nn.Linear(WIDTH, WIDTH), Sloped(kept=True), nn.Linear(WIDTH, 2)).double()
    tokens = TOKENS.double()
    pruner = Pruner(kept, 0.3, structure=Heads(), schedule=None, example=tokens)
    assert [(group.name, group.size) for group in pruner.groups] == [("1.qkv", HEADS)]
    pruner.prune(1.0)
    small = compact(kept, pruner.masks, tokens)
    assert small[1].slopes.shape == (HEADS - 1,)
    torch.testing.assert_close(small(tokens), kept(tokens), rtol=1e-12, atol=1e-12)
