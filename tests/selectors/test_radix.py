"""The k-th smallest score, against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.selectors.radix import Boundary, bracket, find_boundary, true_indices

DTYPES = [torch.float32, torch.float64]


def by_sorting(scores: Tensor, count: int) -> Boundary:
    value = scores.sort().values[count - 1]
    return Boundary(float(value), int((scores < value).sum()), int((scores == value).sum()))


def numbers(dtype: torch.dtype) -> st.SearchStrategy[float]:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest subnormal
    special = [0.0, -0.0, 1.0, -1.0, 1 + info.eps, math.inf, -math.inf, info.max, info.min, tiny, -tiny]
    return st.floats(width=info.bits, allow_nan=False) | st.sampled_from(special)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_finds_what_a_sort_finds(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(numbers(dtype), min_size=1, max_size=40))
    count = data.draw(st.integers(1, len(values)))
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=3).map(sorted))
    scores = torch.tensor(values, dtype=dtype)
    pieces = scores.tensor_split(cuts)  # some of them empty
    assert find_boundary(lambda: pieces, count) == by_sorting(scores, count)


@given(st.lists(st.booleans(), max_size=100), st.integers(1, 20))
def test_finds_the_places_of_what_is_rare(values: list[bool], every: int) -> None:
    rare = torch.tensor(values, dtype=torch.bool)
    rare[::every] = False
    assert torch.equal(true_indices(rare), rare.nonzero().flatten())


@given(st.lists(numbers(torch.float32), min_size=1, max_size=40), st.floats(0.001, 1))
def test_a_bracket_runs_from_low_to_high(values: list[float], share: float) -> None:
    low, high = bracket(torch.tensor(values), share)
    assert low <= high
    assert {low, high} <= set(torch.tensor(values).tolist())
    assert low <= float(torch.tensor(values).sort().values[max(1, round(share * len(values))) - 1]) <= high


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(st.data())
def test_tells_neighbours_apart(dtype: torch.dtype, data: st.DataObject) -> None:
    sign = data.draw(st.sampled_from([-1.0, 1.0]))
    last_bits = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20))
    count = data.draw(st.integers(1, len(last_bits)))
    scores = sign * (1 + torch.tensor(last_bits, dtype=dtype) * torch.finfo(dtype).eps)
    assert find_boundary(lambda: [scores], count) == by_sorting(scores, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_may_have_any_shape_and_strides(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 4, 5, 2, generator=generator, dtype=dtype)
    pieces = [
        image.to(memory_format=torch.channels_last),
        image[0, :, ::2, 1].mT,
        image[1, 0, 0, :1].expand(7, 3, 1),
        image[2, 1, 1, 1],
        image[:0],
    ]
    scores = torch.cat([piece.flatten() for piece in pieces])
    assert len(scores) == 120 + 12 + 21 + 1
    for count in (1, 2, 60, 61, len(scores) - 1, len(scores)):
        assert find_boundary(lambda: pieces, count) == by_sorting(scores, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_one_score(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.0, -0.0, 1.0, -0.0, -1.0, 0.0], dtype=dtype)
    for count in (2, 3, 4, 5):
        found = find_boundary(lambda: [scores], count)
        assert found == Boundary(0.0, below=1, ties=4)
        assert math.copysign(1, found.value) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_ordered(dtype: torch.dtype) -> None:
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    scores = torch.tensor([3, 1, 2, 5, 4], dtype=integer).view(dtype)
    found = [find_boundary(lambda: [scores], count) for count in range(1, 6)]
    assert [each.below for each in found] == [0, 1, 2, 3, 4]
    assert [each.value for each in found] == sorted(scores.tolist())
    assert found[0].value > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_lie_at_the_ends(dtype: torch.dtype) -> None:
    scores = torch.tensor([math.inf, 5.0, -math.inf, math.inf, -math.inf, -math.inf], dtype=dtype)
    expected = [Boundary(-math.inf, 0, 3)] * 3 + [Boundary(5.0, 3, 1)] + [Boundary(math.inf, 4, 2)] * 2
    assert [find_boundary(lambda: [scores], count) for count in range(1, 7)] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_score(dtype: torch.dtype) -> None:
    assert find_boundary(lambda: [torch.tensor(-2.5, dtype=dtype)], 1) == Boundary(-2.5, 0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_scores(dtype: torch.dtype) -> None:
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for count in (1, 37_123, 50_000, 99_999, 100_000):
        assert find_boundary(lambda: scores.chunk(3), count) == by_sorting(scores, count)


def test_scores_are_left_as_they_were() -> None:
    scores = torch.tensor([-0.0, 2.0, -3.0])
    before = scores.view(torch.int32).clone()
    find_boundary(lambda: [scores], 2)
    assert torch.equal(scores.view(torch.int32), before)
