"""Whole experts of mixtures: found however the mixture is written, and cut without a change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningModule, ModelCheckpoint
from lit import seeded, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Channels,
    Experts,
    Global,
    PerLayer,
    Pruner,
    PruningCallback,
    Steps,
    Taylor,
    compact,
    load_compact,
)
from lightning_prune.channels.compaction.experts import is_removed
from lightning_prune.channels.compaction.plan import PLAN, make_plan
from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.channels.compaction.shrink import remaining_units

WIDTH, HIDDEN, COUNT = 8, 10, 4
EXPERT = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH  # weights and biases of one
ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def expert() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


class Listed(nn.Module):
    """A list of experts, each of which gets the rows that are sent to it, if any is."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert() for _ in range(COUNT))

    def forward(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        mixed = torch.zeros_like(rows)
        for number, each in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            if len(row):
                mixed.index_add_(0, row, each(rows[row]) * shares[row, place, None])
        return mixed


class Named(nn.Module):
    """Experts by name, all of which see all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert {number}": expert() for number in range(COUNT)})

    def forward(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        whole = torch.zeros(len(rows), COUNT).to(rows).scatter(1, chosen, shares)
        return sum(
            share[:, None] * each(input=rows)
            for share, each in zip(whole.mT, self.experts.values(), strict=True)
        )


class Stacked(nn.Module):
    """The weights of all experts in one tensor, as in Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = COUNT
        self.up, self.up_bias = (
            nn.Parameter(torch.randn(COUNT, HIDDEN, WIDTH)),
            nn.Parameter(torch.randn(COUNT, HIDDEN)),
        )
        self.down, self.down_bias = (
            nn.Parameter(torch.randn(COUNT, WIDTH, HIDDEN)),
            nn.Parameter(torch.randn(COUNT, WIDTH)),
        )

    def forward(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        mixed = torch.zeros_like(rows)
        for number in range(self.num_experts):
            row, place = torch.where(chosen == number)
            hidden = F.linear(rows[row], self.up[number], self.up_bias[number]).relu()
            mixed.index_add_(
                0, row, F.linear(hidden, self.down[number], self.down_bias[number]) * shares[row, place, None]
            )
        return mixed


class Gathered(Stacked):
    """Reads the weights of the expert of each row, so that each number is that of an expert."""

    def forward(self, rows: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        hidden = (torch.einsum("nkhw,nw->nkh", self.up[chosen], rows) + self.up_bias[chosen]).relu()
        found = torch.einsum("nkwh,nkh->nkw", self.down[chosen], hidden) + self.down_bias[chosen]
        return (found * shares[..., None]).sum(1)


class Net(nn.Module):
    """A mixture that adds to what it reads: two experts for each row."""

    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.read, self.router, self.mixture = nn.Linear(6, WIDTH), nn.Linear(WIDTH, COUNT), mixture()
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.read(rows)
        shares, chosen = self.router(rows).softmax(-1).topk(2)
        return self.out(rows + self.mixture(rows, shares, chosen))


MIXTURES = pytest.mark.parametrize("mixture", [Listed, Named, Stacked, Gathered])


def pruned(net: nn.Module, target: float = 0.5, **parts: Any) -> Pruner:
    pruner = Pruner(net, target, structure=Experts(), schedule=None, example=ROWS, **parts)
    pruner.prune(1.0)
    return pruner


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module) -> float:
    rows = torch.randn(99, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return float((copy.deepcopy(one).double()(rows) - copy.deepcopy(other).double()(rows)).abs().max())


def size(net: nn.Module) -> int:
    return sum(each.numel() for each in net.parameters())


@MIXTURES
def test_masked_and_compacted_networks_are_equal(mixture: type[nn.Module]) -> None:
    net = seeded(lambda: Net(mixture))
    dense = copy.deepcopy(net)
    pruner = pruned(net)
    (group,) = pruner.groups
    assert group.size == COUNT
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == 2 * EXPERT
    small = compact(net, pruner.masks, ROWS)
    assert size(net) - size(small) == 2 * EXPERT
    assert difference(net, small) == 0 < difference(net, dense)
    assert list(small.state_dict()) == list(net.state_dict())


@MIXTURES
def test_one_expert_may_be_left_and_no_mixture_is_emptied(mixture: type[nn.Module]) -> None:
    net = seeded(lambda: Net(mixture))
    pruner = pruned(net, 0.99)
    assert pruner.protected == {group.name for group in pruner.groups}
    small = compact(net, pruner.masks, ROWS)
    assert size(net) - size(small) == (COUNT - 1) * EXPERT
    assert difference(net, small) == 0


@pytest.mark.parametrize("mixture", [Listed, Stacked])
def test_a_budget_counts_whole_experts(mixture: type[nn.Module]) -> None:
    net = seeded(lambda: Net(mixture))
    pruner = pruned(net, EXPERT / size(net), selector=Global(budget="params"))
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == EXPERT


def test_multiply_adds_are_those_of_the_example() -> None:
    net = seeded(lambda: Net(Named))
    units = Experts().units(net, ROWS)
    kept = {"mixture.experts": torch.tensor([True, False, False, True])}
    macs = units.budgets["macs"]
    assert macs.total - macs.cost(kept) == 2 * len(ROWS) * 2 * WIDTH * HIDDEN


@pytest.mark.parametrize("mixture", [Listed, Stacked])
def test_scores_are_sums_over_each_expert(mixture: type[nn.Module]) -> None:
    net = seeded(lambda: Net(mixture))
    pruner = Pruner(net, 0.5, criterion=Taylor(), structure=Experts(), schedule=None, example=ROWS)
    net(ROWS).square().mean().backward()
    pruner.observe()
    parts = [each for name, each in net.mixture.named_parameters()]
    if mixture is Stacked:
        expected = sum((each * each.grad).flatten(1).sum(1) for each in parts)
    else:
        sums = torch.stack([(each * each.grad).sum() for each in parts])
        expected = sums.view(COUNT, -1).sum(1)
    (found,) = pruner.scores().values()
    torch.testing.assert_close(found, expected.detach().square())


def test_an_expert_without_rows_is_scored_and_goes() -> None:
    net = seeded(lambda: Net(Listed))
    net.router.bias.data[1] = -1e6
    pruner = Pruner(net, 0.25, criterion=Taylor(), structure=Experts(), schedule=None, example=ROWS)
    net(ROWS).square().mean().backward()
    assert net.mixture.experts[1][0].weight.grad is None
    pruner.observe()
    pruner.prune(1.0)
    assert [bool(pruner.masks[f"mixture.experts.{number}.0.weight"].any()) for number in range(COUNT)] == [
        *(True, False, True, True)
    ]
    small = compact(net, pruner.masks, ROWS)
    for each in (net, small):
        each.router.bias.data[1] = 1.0  # now rows are sent to it
    assert difference(net, small) == 0
    assert is_removed(small.mixture.experts[1])


def test_what_was_cut_is_pruned_further_and_expanded_again() -> None:
    for mixture in (Listed, Gathered):
        net = seeded(lambda mixture=mixture: Net(mixture))
        pruner = pruned(net, 0.25)
        small = compact(net, pruner.masks, ROWS)
        again = pruned(small, 1 / 3)
        (group,) = again.groups
        assert group.size == COUNT - 1
        smaller = compact(small, again.masks, ROWS)
        assert difference(small, smaller) == 0
        assert size(net) - size(smaller) == 2 * EXPERT
        plan = make_plan(net, remaining_units(net, pruner.masks, pruner.groups), {})
        twin = copy.deepcopy(net)
        replay_(twin, PLAN(plan.to_state()))
        assert size(twin) == size(small)
        expand_(twin, plan)
        assert difference(net, twin) == 0
        assert [vars(each).keys() for each in twin.modules()] == [vars(each).keys() for each in net.modules()]


def test_experts_and_channels_go_at_once() -> None:
    net = seeded(lambda: Net(Listed))
    experts = pruned(net)
    channels = Pruner(net, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=ROWS)
    channels.prune(1.0)
    small = compact(net, [experts.masks, channels.masks], ROWS)
    assert difference(net, small) < 1e-12
    assert size(small) < size(net) - 2 * EXPERT


def test_channels_go_after_experts() -> None:
    net = seeded(lambda: Net(Listed))
    small = compact(net, pruned(net).masks, ROWS)
    found = {group.name: group.size for group in Channels().units(small, ROWS).groups}
    left = [number for number, each in enumerate(small.mixture.experts) if not is_removed(each)]
    assert found == {"read": WIDTH} | {f"mixture.experts.{number}.0": HIDDEN for number in left}


def test_a_removed_expert_gives_the_type_of_autocast() -> None:
    net = seeded(lambda: Net(Listed))
    small = compact(net, pruned(net).masks, ROWS)
    gone = next(each for each in small.mixture.experts if is_removed(each))
    assert gone(ROWS[:, :1].double()).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert gone(ROWS).dtype is expert()(torch.ones(1, WIDTH)).dtype is torch.bfloat16


class Kept(nn.Module):
    """Lists of modules that are no mixtures that may be cut."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(WIDTH, COUNT if kind != "no router" else COUNT + 1)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))
        if kind == "tied":
            self.also = self.parts[1].weight
        if kind == "residual":
            self.parts = nn.ModuleList(Residual() for _ in range(COUNT))
        if kind == "narrow":
            self.parts = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(COUNT))

    def forward(self, rows: Tensor) -> Tensor:
        shares = self.router(rows).softmax(-1)
        if self.kind == "one after the other":
            for part in self.parts:
                rows = part(rows)
            return rows * shares[:, :1]
        if self.kind == "with something between":
            for part in self.parts:
                rows = part(rows).relu()
            return rows * shares[:, :1]
        if self.kind == "not called":
            return sum(shares[:, :1] * F.linear(rows, part.weight) for part in self.parts)
        return sum(shares[:, :1] * part(rows) for part in self.parts)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.inner(rows)


@pytest.mark.parametrize(
    ("kind", "why"),
    {
        "no router": "no module that runs before it gives one number for each",
        "one after the other": "one of its modules reads what another one gives",
        "with something between": "one of its modules reads what another one gives",
        "tied": "shares a weight with the model itself",
        "residual": "parts.0 gives something else than zeros of the shape of its input",
        "narrow": "parts.0 gives something else than zeros of the shape of its input",
        "not called": "calls none of its modules",
    }.items(),
)
def test_what_cannot_go_stays_with_the_reason(kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"nothing to prune in Kept.*{why}"):
        Pruner(Kept(kind), 0.5, structure=Experts(), schedule=None, example=torch.randn(5, WIDTH))


def test_limits_count_experts() -> None:
    net = seeded(lambda: Net(Listed))
    assert [each.units(net, ROWS).groups[0].least for each in (Experts(minimum=3), Experts(round_to=2))] == [
        3,
        2,
    ]
    with pytest.raises(ValueError, match="exclude names it"):
        Experts(exclude="mixture*").units(net, ROWS)


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Net(Listed), nn.ReLU(), nn.Linear(2, 6), Net(Stacked))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_experts_go_in_a_fit_that_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(ROWS), 8)

    def callback() -> PruningCallback:
        return PruningCallback(0.5, structure=Experts(), schedule=Steps({"1ep": 0.5, "2ep": 1.0}), compact=True)

    model, pruning = seeded(Lit), callback()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, pruning, keep, max_epochs=3, enable_checkpointing=True)
    run.fit(model, data)
    assert size(seeded(Lit)) - size(model) == 4 * EXPERT
    assert pruning.report.proof.difference == 0
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_compact(tmp_path / "small.ckpt", Lit())
    resumed = Lit()
    trainer(tmp_path, callback(), max_epochs=3).fit(resumed, data, ckpt_path=tmp_path / "epoch=1.ckpt")
    longer = Lit()
    trainer(tmp_path, callback(), max_epochs=4).fit(longer, data, ckpt_path=tmp_path / "small.ckpt")
    assert size(longer) == size(model)
    with torch.no_grad():
        assert torch.equal(again(ROWS), model(ROWS))
        assert torch.equal(resumed(ROWS), model(ROWS))
