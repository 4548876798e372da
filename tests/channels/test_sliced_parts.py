"""Slices: parts of one size go together, others apart, whoever takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Channels, Global, Pruner, compact
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.sliced_parts import SlicedParts

ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()


class First(nn.Module):
    """Takes as many channels as its number says."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.width]


class Rest(First):
    """Takes what is left."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.width :]


class Shared(nn.Module):
    """Two modules take the first part of what one layer makes, and a third one takes the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(4, 10)
        self.one, self.two, self.rest = First(), First(), Rest()
        self.heads = nn.ModuleList(nn.Linear(size, 3) for size in (6, 6, 4))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.all(rows).relu()
        parts = self.one(hidden), self.two(hidden), self.rest(hidden)
        return sum(head(part) for head, part in zip(self.heads, parts, strict=True))


def test_a_part_that_several_modules_take_changes_the_number_of_each() -> None:
    torch.manual_seed(0)
    model = Shared().double()
    pruner = Pruner(model, 0.5, structure=Channels(), selector=Global(most=0.5), schedule=None, example=ROWS)
    assert {group.size: set(group.attributes) for group in pruner.groups} == {
        6: {("one", "width"), ("two", "width"), ("rest", "width")},
        4: set(),
    }
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, ROWS)
    torch.testing.assert_close(smaller(ROWS), model(ROWS), rtol=1e-12, atol=1e-12)
    assert (smaller.one.width, smaller.two.width, smaller.rest.width) == (3, 3, 3)
    assert smaller.all.out_features == 5


@pytest.mark.parametrize(
    ("bounds", "alike"),
    [
        ([(0, 6), (6, 9), (9, 12)], [{6, 9}, {7, 10}, {8, 11}]),  # a part of six, and two of three
        ([(9, 12), (0, 6), (6, 9)], [{6, 9}, {7, 10}, {8, 11}]),
        ([(0, 4), (4, 8), (8, 12)], [{0, 4, 8}, {1, 5, 9}, {2, 6, 10}, {3, 7, 11}]),
        ([(4, 8)], [{0, 4, 8}, {1, 5, 9}, {2, 6, 10}, {3, 7, 11}]),  # one of three
        ([(0, 6)], [{0, 6}, {1, 7}, {2, 8}, {3, 9}, {4, 10}, {5, 11}]),  # a half
        ([(0, 5), (5, 12)], []),
        ([(0, 4)], []),  # the first of any number
        ([(3, 4), (4, 5)], []),
        ([(0, 6), (3, 9)], [{0, 6}, {1, 7}, {2, 8}, {3, 9}, {4, 10}, {5, 11}]),  # overlapping
    ],
)
def test_parts_of_one_size_are_coupled(bounds: list[tuple[int, int]], alike: list[set[int]]) -> None:
    labels, sliced = Labels(), SlicedParts()
    field = labels.new(12)
    for each in bounds:
        sliced.note(field, 0, each, "")
    sliced.couple(labels)
    roots = labels.find(field).tolist()
    found = ({place for place, root in enumerate(roots) if root == each} for each in dict.fromkeys(roots))
    assert [each for each in found if len(each) > 1] == alike


class Dead(nn.Module):
    """Computes something that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        F.pad(hidden, (0, 8))[..., :8]
        return self.second(hidden.relu())


def test_slices_that_no_result_depends_on_keep_nothing() -> None:
    (group,) = Channels().units(Dead().double(), ROWS).groups
    assert (group.name, group.size) == ("first", 8)
