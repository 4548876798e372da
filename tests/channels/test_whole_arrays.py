"""What whole arrays compute, compared with loops over elements; and sizes that are no widths to adjust."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import Channels
from lightning_prune.channels.compaction.plan import Cut, Plan
from lightning_prune.channels.compaction.replay import cut_tensor
from lightning_prune.channels.compaction.size_attributes import attribute_choices
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.units.slices import AxisSlice

COUPLED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)


@settings(deadline=None)
@given(st.lists(COUPLED, max_size=5))
def test_coupled_labels_are_the_connected_ones(steps: list[list[tuple[int, int]]]) -> None:
    labels = Labels()
    labels.new(9)
    least, frozen = list(range(10)), set[int]()
    for number, pairs in enumerate(steps):
        left, right = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        labels.couple(left, right, f"step {number}")
        for pair in pairs:
            low, high = sorted(least[each] for each in pair)
            if low == 0:  # what has no label is not cut, nor is what meets it
                frozen |= {high} - {0}
            else:
                least = [low if each == high else each for each in least]
    assert labels.find(torch.arange(10)).tolist() == least
    assert set(labels.reasons()) == {least[each] for each in frozen}


def test_labels_are_coupled_after_broadcasting() -> None:
    labels = Labels()
    rows, columns = labels.new(2).view(2, 1), labels.new(3)
    labels.couple(rows, columns)
    assert labels.find(torch.arange(6)).tolist() == [0, 1, 1, 1, 1, 1]


KEPT = st.lists(st.booleans(), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(st.tuples(KEPT, st.booleans()), min_size=1, max_size=4), st.permutations(range(4)))
def test_cut_tensors_have_the_elements_and_the_layout(
    dims: list[tuple[list[bool], bool]], order: list[int]
) -> None:
    shape = [len(kept) for kept, _ in dims]
    places = [each for each in order if each < len(shape)]
    inner = torch.arange(int(numpy.prod(shape))).view([shape[each] for each in places])
    tensor = inner.permute([places.index(each) for each in range(len(shape))])
    cuts = [
        Cut("weight", dim, len(kept), tuple(numpy.flatnonzero(kept).tolist()))
        for dim, (kept, cut) in enumerate(dims)
        if cut
    ]
    found = cut_tensor(tensor, reversed(cuts))
    grid = [numpy.flatnonzero(kept) if cut else numpy.arange(len(kept)) for kept, cut in dims]
    assert found.tolist() == tensor.numpy()[numpy.ix_(*grid)].tolist()
    assert found.data_ptr() != tensor.data_ptr() or not found.numel()
    ordered = found.permute(places)
    assert ordered.is_contiguous()
    assert Plan(tuple(cuts)).cuts_of("weight") == cuts
    assert Plan(tuple(cuts)).cuts_of("bias") == []


@settings(deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda rank: st.tuples(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    ),
    st.data(),
)
def test_units_are_kept_that_have_a_kept_element(shape: tuple[list[int]], data: st.DataObject) -> None:
    (sizes,) = shape
    dim = data.draw(st.integers(0, len(sizes) - 1))
    units = data.draw(st.lists(st.integers(-1, 2), min_size=sizes[dim], max_size=sizes[dim]))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=64, max_size=64)))[: int(numpy.prod(sizes))]
    index = torch.tensor([*units[:-1], 2])  # the greatest number is that of the last unit
    part = AxisSlice("weight", torch.zeros(sizes), dim, index)
    expected = [False] * 3
    for place, unit in enumerate(index.tolist()):
        if unit >= 0:
            expected[unit] |= bool(mask.view(sizes).select(dim, place).any())
    assert part.kept(mask.view(sizes)).tolist() == expected
    whole = AxisSlice("weight", torch.zeros(sizes), dim)
    assert whole.kept(mask.view(sizes)).tolist() == [
        bool(mask.view(sizes).select(dim, place).any()) for place in range(sizes[dim])
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_units_have_the_elements_at_their_places(sizes: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(sizes) - 1))
    units = data.draw(st.lists(st.integers(-1, 2), min_size=sizes[dim], max_size=sizes[dim]))
    elements = torch.arange(1.0, 1 + numpy.prod(sizes)).view(sizes)
    index = torch.tensor([*units[:-1], 2])
    part = AxisSlice("weight", torch.zeros(sizes), dim, index)
    expected: list[list[float]] = [[], [], []]
    for place, unit in enumerate(index.tolist()):
        if unit >= 0:
            expected[unit] += elements.select(dim, place).flatten().tolist()
    found = part.vectors(elements)
    assert [row[: len(each)].tolist() for row, each in zip(found, expected, strict=True)] == expected
    assert found.sum(1).tolist() == part.sum(elements).tolist() == list(map(sum, expected))


class Narrowing(nn.Module):
    """Layers of one width between norms, which a literal number fixes."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.width = 8
        self.one, self.norm = nn.Linear(6, 8), norm(8)
        self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.norm(self.one(rows)).view(len(rows), self.width)
        logits: Tensor = self.head(self.two(hidden).relu())
        return logits


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_width_of_a_norm_is_no_size_to_adjust(norm: type[nn.Module]) -> None:
    model = Narrowing(norm)
    groups = {group.name: group for group in Channels().units(model, torch.randn(4, 6)).groups}
    assert attribute_choices(model, groups["one"]) == [(("", "width"),)]
