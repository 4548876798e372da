"""``OptimalBrainSurgeon`` against least squares with and without each unit, and against SparseGPT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit, fit
from torch import Tensor, nn

from lightning_prune import (
    Blocks,
    Channels,
    Global,
    Heads,
    NofM,
    OneShot,
    OptimalBrainSurgeon,
    PerLayer,
    Pruner,
    PruningCallback,
    Reconstruct,
)
from lightning_prune.statistics.reconstruction import least_squares


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int) -> Tensor:
    return numbers(rows, columns) @ numbers(columns, columns, seed=1)


def system(rows: Tensor, ridge: float) -> Tensor:
    """``E[x x^T]`` with a ridge on the diagonal."""
    square = rows.double().t() @ rows.double() / len(rows)
    return square + ridge * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)


def least_error(matrix: Tensor, square: Tensor, gone: Tensor) -> Tensor:
    """``min over V of sum of (V - W) H (V - W)^T``, where V is 0 in the columns that are gone, by rows."""
    root, errors = torch.linalg.cholesky(square, upper=True), []
    for row in matrix.double():
        kept = torch.linalg.lstsq(root[:, ~gone], root @ row).solution
        errors.append((root[:, ~gone] @ kept - root @ row).square().sum())
    return torch.stack(errors)


def test_a_weight_scores_what_the_best_other_weights_leave() -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(6, 4), correlated(50, 6)
    pruner = Pruner(model, 0.5, criterion=OptimalBrainSurgeon(ridge=0.05), schedule=None)
    found = pruner.scores(batches=rows.split(20))["weight"]
    for column in range(6):
        gone = torch.arange(6) == column
        expected = least_error(model.weight.detach(), system(rows, 0.05), gone)
        torch.testing.assert_close(found[:, column].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_block_scores_the_sum_of_its_weights() -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(6, 4), correlated(50, 6)
    single = Pruner(model, 0.5, criterion=OptimalBrainSurgeon(), schedule=None).scores(batches=[rows])["weight"]
    blocks = Pruner(model, 0.5, criterion=OptimalBrainSurgeon(), structure=Blocks(2, 3), schedule=None)
    found = blocks.scores(batches=[rows])["weight"]
    torch.testing.assert_close(found, single.view(2, 2, 2, 3).sum((1, 3)))


def test_a_channel_scores_what_is_left_in_all_layers_that_read_it() -> None:
    torch.manual_seed(0)

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 3, 3, padding=1)
            self.linear = nn.Linear(5 * 16, 4)

        def forward(self, images: Tensor) -> Any:
            found = self.first(images).relu()
            return self.conv(found), self.linear(found.flatten(1))

    model, images = Forked(), numbers(300, 2, 6, 6)
    criterion = OptimalBrainSurgeon(ridge=0.02, positions=10**6)
    pruner = Pruner(model, 0.4, criterion=criterion, structure=Channels(), schedule=None, example=images[:2])
    (group,) = pruner.groups
    found = pruner.scores(batches=images.split(100))[group.name]
    with torch.no_grad():
        given = model.first(images).relu()
        patches = nn.functional.unfold(given, 3, padding=1).transpose(1, 2).flatten(0, 1)
        readers = [(model.conv.weight.flatten(1), patches, 9), (model.linear.weight, given.flatten(1), 16)]
        for channel in range(5):
            expected = 0.0
            for matrix, rows, each in readers:
                gone = torch.arange(matrix.shape[1]) // each == channel
                expected += float(least_error(matrix.detach(), system(rows, 0.02), gone).sum())
            assert float(found[channel]) == pytest.approx(expected, rel=1e-3)


def test_heads_and_attention_are_scored() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    rows = numbers(30, 5, 16)
    parts = {"criterion": OptimalBrainSurgeon(), "schedule": None, "example": rows[:2]}
    heads = Pruner(model, 0.5, structure=Heads(), **parts).scores(batches=[rows])
    assert [score.shape for score in heads.values()] == [torch.Size([4])]
    assert all(bool((score > 0).all()) for score in heads.values())
    weights = Pruner(model, 0.5, selector=PerLayer(), **parts)
    weights.prune(1.0, reconstruct=Reconstruct(), batches=[rows])
    assert weights.sparsity == 0.5
    assert not weights.unreconstructed


def sparsegpt(weight: Tensor, hessian: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The algorithm of the paper, with blocks of one: masks and weights.

    The inverse for the columns that are left is computed anew at each of them.
    """
    weight, kept = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % m == 0:
            scores = []
            for ahead in range(column, column + m):
                inverse = torch.linalg.inv(hessian[ahead:, ahead:])
                scores.append(weight[:, ahead].square() / inverse[0, 0])
            lowest = torch.stack(scores, 1).argsort(1)[:, : m - n] + column
            kept.scatter_(1, lowest, value=False)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = weight[:, column] * ~kept[:, column] / inverse[0, 0]
        weight[:, column:] -= torch.outer(error, inverse[0])
    return kept, weight * kept


@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 6)])
def test_with_reconstruction_a_pattern_is_sparsegpt(
    pattern: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_EXACT", 0)  # sweep as in a large layer
    torch.manual_seed(0)
    model, rows = nn.Linear(12, 7, bias=False).double(), correlated(80, 12).double()
    dense = copy.deepcopy(model)
    criterion = OptimalBrainSurgeon(ridge=0.01)
    pruner = Pruner(model, criterion=criterion, selector=NofM(*pattern), schedule=None)
    pruner.prune(1.0, reconstruct=Reconstruct(ridge=0.01), batches=rows.split(30))
    weight = dense.weight.detach()
    kept, expected = sparsegpt(weight, system(rows, 0.01), *pattern)
    assert torch.equal(pruner.masks["weight"], kept)
    # a row that the algorithm of the paper makes worse stays as it was
    masked = weight * kept
    found, before = (((each - weight) @ rows.t()).square().sum(1) for each in (expected, masked))
    expected = torch.where((found < before)[:, None], expected, masked)
    assert int((found < before).sum()) >= 6
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_inputs_of_a_convolution_are_in_turn_within_each_position_of_the_kernel() -> None:
    torch.manual_seed(0)
    conv, images = nn.Conv2d(4, 3, 3, bias=False), numbers(60, 4, 3, 3)
    linear = nn.Linear(36, 3, bias=False)
    with torch.no_grad():  # inputs last, so that each position is a run of columns
        linear.weight.copy_(conv.weight.permute(0, 2, 3, 1).flatten(1))
    parts = {"criterion": OptimalBrainSurgeon(), "selector": NofM(2, 4), "schedule": None}
    one, other = Pruner(conv, **parts), Pruner(linear, **parts)
    one.prune(1.0, batches=[images])
    other.prune(1.0, batches=[images.permute(0, 2, 3, 1).flatten(1)])
    assert torch.equal(one.masks["weight"].permute(0, 2, 3, 1).flatten(1), other.masks["weight"])


def test_it_beats_magnitude_on_correlated_inputs() -> None:
    torch.manual_seed(0)
    dense, rows = nn.Linear(32, 16), correlated(400, 32)
    errors = []
    for criterion in ({}, {"criterion": OptimalBrainSurgeon()}):
        model = copy.deepcopy(dense)
        pruner = Pruner(model, 0.7, selector=PerLayer(), schedule=None, **criterion)
        pruner.prune(1.0, reconstruct=Reconstruct(), batches=[rows[:300]])
        with torch.no_grad():
            errors.append(float((model(rows[300:]) - dense(rows[300:])).square().mean()))
    assert errors[1] < errors[0]


def test_layers_that_no_pass_runs_or_that_take_too_much_stay_with_a_reason() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, rows: Tensor) -> Tensor:
            return self.used(rows)

    pruner = Pruner(Idle(), 0.5, criterion=OptimalBrainSurgeon(), schedule=None)
    pruner.prune(1.0, batches=[numbers(20, 8)])
    assert int(pruner.masks["idle.weight"].sum()) == 64
    assert "has seen no step of it" in pruner.remarks["frozen"]["idle.weight"]
    small = OptimalBrainSurgeon(max_gigabytes=2e-3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 40))
    frozen = Pruner(model, 0.5, criterion=small, schedule=None).frozen
    assert frozen == {"1.weight": f"{small!r} needs 0.00316 GB for it, above max_gigabytes"}


def test_without_batches_it_says_what_it_needs() -> None:
    pruner = Pruner(nn.Linear(8, 8), 0.5, criterion=OptimalBrainSurgeon(), schedule=None)
    with pytest.raises(
        RuntimeError, match=r"calibration batch: give step\(\), prune\(\) or scores\(\) `batches="
    ):
        pruner.prune(1.0)


def test_a_fit_keeps_the_batches_that_it_looks_at(tmp_path: Path) -> None:
    callback = PruningCallback(
        0.5,
        criterion=OptimalBrainSurgeon(batches=2),
        structure=Channels(),
        selector=Global(normalize="l2"),
        schedule=OneShot("1ep"),
    )
    fit(tmp_path, Lit(), callback, max_epochs=2)
    assert sum(int(mask.any(1).sum()) for name, mask in callback.masks.items() if name == "net.4.weight") < 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "batches=0 must be a whole number of at least 1"),
        ({"ridge": 0.0}, "ridge=0.0 must be a number above 0"),
        ({"max_gigabytes": -1}, "max_gigabytes=-1 must be a number above 0"),
        ({"pattern": (4, 2)}, r"pattern=\(4, 2\) must be \(n, m\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimalBrainSurgeon(**arguments)
