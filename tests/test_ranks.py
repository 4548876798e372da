"""Two processes prune as one does, and alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lit import same
from processes import run_script
from ranks import GATHERED, JOINT, RESUMED, Stop, cutting, run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has after all fits."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_script("ranks.py", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*JOINT, "accumulated"])
def test_two_processes_prune_as_one_does_on_the_joint_batch(
    tmp_path: Path, ranks: list[dict[str, Any]], name: str
) -> None:
    one = run(tmp_path, JOINT.get(name, JOINT["weights"])(), batch_size=64, strategy="auto", devices=1)
    assert sum(int((~mask).sum()) for mask in one["masks"].values()) > 0
    for rank in ranks:
        assert same(rank[name]["masks"], one["masks"])
        torch.testing.assert_close(rank[name]["weights"], one["weights"], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The fit ended before the last pruning event:UserWarning")
@pytest.mark.parametrize("name", GATHERED)
def test_two_processes_gather_what_one_does_on_the_joint_batch(
    tmp_path: Path, ranks: list[dict[str, Any]], name: str
) -> None:
    alone = {"batch_size": 64, "strategy": "auto", "devices": 1}
    one = run(tmp_path, GATHERED[name](), callbacks=[Stop()], **alone)
    assert one["statistics"]
    for statistics in one["statistics"].values():
        assert any(bool(found.any()) for found in (*statistics["sums"].values(), statistics["features"]))
    for rank in ranks:
        torch.testing.assert_close(rank[name]["statistics"], one["statistics"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", [*JOINT, "accumulated", "uneven", "unused"])
def test_all_processes_hold_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert same(first, second)
    assert sum(int((~mask).sum()) for mask in first["masks"].values()) > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_of_two_processes_is_the_run_that_was_not_stopped(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for rank in ranks:
        whole, *again = rank["stopped"][name].values()
        assert [same(each, whole) for each in again] == [True] * 3
        assert sum(int((~mask).sum()) for mask in whole["masks"].values()) > 0


def test_two_processes_cut_the_network_as_one_does(tmp_path: Path, ranks: list[dict[str, Any]]) -> None:
    one = run(tmp_path, cutting(), batch_size=64, strategy="auto", devices=1)
    assert (
        len(one["weights"]["net.0.bias"]) + len(one["weights"]["net.4.bias"]) == 14
    )  # of 24, 0.4 of them gone
    for rank in ranks:
        torch.testing.assert_close(rank["cut"]["weights"], one["weights"], rtol=1e-9, atol=1e-12)
        whole, *again = rank["cut and stopped"].values()
        assert [same(each, whole) for each in again] == [True] * 3


def test_a_branch_that_no_process_takes_is_left_alone(ranks: list[dict[str, Any]]) -> None:
    masks = ranks[0]["unused"]["masks"]
    assert [int((~masks[f"ways.{way}.weight"]).sum()) > 0 for way in range(3)] == [True, True, False]


def test_masks_that_differ_stop_all_processes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "the masks of rank 1 are not those of rank 0" in rank["error"]["text"]


def test_two_processes_are_taught_as_with_a_term_in_the_loss(ranks: list[dict[str, Any]]) -> None:
    for rank in (each["distilled"] for each in ranks):
        torch.testing.assert_close(rank["taught"], rank["explicit"], rtol=0, atol=1e-12)
        assert same(rank["taught"], ranks[0]["distilled"]["taught"])
        moved = [(rank["plain"][name] - each).abs().max() for name, each in rank["taught"].items()]
        assert float(max(moved)) > 1e-4
