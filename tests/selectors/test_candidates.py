"""The lowest of several groups, against a sort."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import Channels, Global, Pruner
from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.selection import remove_lowest
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice


class Given(Criterion):
    """The weights themselves."""

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        return group.weights[0]


class Misled(Candidates):
    """Its sample may be anything."""

    seen: Tensor

    def sample(self) -> Iterator[Tensor]:
        yield self.seen


SCORES = st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=12), min_size=1, max_size=4)


def misled(rows: list[list[float]], gone: list[bool], sample: list[float]) -> list[Candidates]:
    found: list[Candidates] = []
    flags = iter(gone)
    for number, row in enumerate(rows):
        kept = torch.tensor([not next(flags) for _ in row])
        group = UnitGroup(f"{number}", (AxisSlice(f"{number}", torch.tensor(row), dim=0),))
        each = Misled(group, kept, Given(), Statistics.zeros((), kept, torch.float32), torch.float32)
        each.seen = torch.tensor(sample)
        found.append(each)
    return found


@given(SCORES, st.data())
def test_the_lowest_go_however_misleading_the_sample(rows: list[list[int]], data: st.DataObject) -> None:
    scores = [float(score) for row in rows for score in row]
    gone = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    sample = data.draw(st.lists(st.sampled_from([*scores, -math.inf, -9.0, 9.0]), min_size=1, max_size=6))
    starts, start = [], 0
    for row in rows:
        starts.append(range(start, start + len(row)))
        gone[start] = False  # no group is empty
        start += len(row)
    count = data.draw(st.integers(sum(gone), len(scores) - len(rows)))
    found = misled([[float(score) for score in row] for row in rows], gone, sample)
    remove_lowest(found, count)
    # of each group the best that is left stays, the earliest of equals
    best = {
        max((place for place in row if not gone[place]), key=lambda place: (scores[place], -place))
        for row in starts
    }
    emptied = True
    order = sorted(range(len(scores)), key=lambda place: (not gone[place], scores[place], -place))
    protected: set[int] = set()
    while emptied:
        removed = [place for place in order if place not in protected][:count]
        emptied = {place for row, place in zip(starts, sorted(best), strict=True) if set(row) <= set(removed)}
        protected |= emptied
    kept = torch.cat([each.kept for each in found]).tolist()
    assert [place for place, stays in enumerate(kept) if not stays] == sorted(removed)


@given(SCORES, st.data())
def test_what_cannot_be_scored_changes_nothing(rows: list[list[int]], data: st.DataObject) -> None:
    floats = [[float(score) for score in row] for row in rows]
    floats[-1][-1] = math.nan
    size = sum(map(len, rows))
    gone = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    gone[-1] = False
    assume(sum(gone) < size - len(rows))
    found = misled(floats, gone, [data.draw(st.floats(-4, 4, width=32))])
    with pytest.raises(ValueError, match="must give finite scores"):
        remove_lowest(found, sum(gone) + 1)
    assert torch.cat([each.kept for each in found]).tolist() == [not flag for flag in gone]


class Counted(Criterion):
    """L1 norms, and how often they were computed for each group."""

    counts: ClassVar[Counter[str]] = Counter()

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        self.counts[group.name] += 1
        return group.sum(torch.abs, group.weights)


def test_channels_are_scored_once_an_event_however_often_their_scores_are_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    Counted.counts.clear()
    pruner = Pruner(
        model,
        0.5,
        criterion=Counted(),
        structure=Channels(),
        selector=Global(budget="macs"),
        schedule=None,
        example=torch.ones(1, 8),
    )
    pruner.prune(1.0)
    assert Counted.counts == {"0": 1, "2": 1}
