"""A number that is a sum of several sizes shrinks by as much as one of them does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.channels.compaction.own_norms import own_norm
from lightning_prune.channels.compaction.plan import make_plan

TOKENS = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Mixer(nn.Module):
    """One convolution filters values and two states, as in Mamba-2: its width is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.mixed = 8, 5, 18
        self.into = nn.Linear(6, self.inner + self.mixed)
        self.along = nn.Conv1d(self.mixed, self.mixed, 3, padding=1, groups=self.mixed)
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed = self.into(x).split([self.inner, self.mixed], -1)
        mixed = self.along(mixed.mT).mT
        values, b, c = mixed.split([self.inner, self.state, self.state], -1)
        # the number of values is in the code, so that the states go alone
        y = (c @ b.mT) @ values.reshape(*x.shape[:2], 8)
        return x + self.out(y * gate.sigmoid())


def test_the_width_of_what_several_sizes_make_up_shrinks_by_what_went() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Mixer(), nn.Linear(6, 3)).double()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=TOKENS)
    (group,) = (group for group in pruner.groups if group.size == 5)
    assert set(group.attributes) == {("1", "state"), ("1", "mixed")}
    kept = torch.tensor([True, False, True, False, False])
    assert make_plan(model, [(group, kept)], {}).attributes["1"] == {"state": (5, 2), "mixed": (18, 12)}
    pruner.prune(1.0)
    small = compact(model, pruner.masks, TOKENS)
    assert (small[1].inner, small[1].state, small[1].mixed) == (8, 3, 14)
    assert small[1].along.weight.shape == (14, 1, 3)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-12)


class Gated(nn.Module):
    """A norm of groups of channels that are gated first, as in Mamba-2; the gate is not always there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.size, self.eps = nn.Parameter(torch.ones(width)), width, 1e-5

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = (x if gate is None else x * gate.sigmoid()).unflatten(-1, (-1, self.size))
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.weight * x.flatten(-2)


class Fed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate, self.norm, self.out = nn.Linear(6, 8), nn.Linear(6, 8), Gated(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(self.into(x), self.gate(x)))
        return y


def test_a_norm_with_a_gate_in_code_of_one_width_is_not_taken_for_one_without() -> None:
    assert own_norm(Gated(8)) is None
    model = nn.Sequential(Fed(), nn.ReLU(), nn.Linear(5, 3)).double()
    units = Channels().units(model, TOKENS)
    assert [(group.name, group.size) for group in units.groups] == [("0.out", 5)]
    with pytest.raises(ValueError, match="finds nothing to prune"):
        Channels(include="0.into").units(model, TOKENS)
