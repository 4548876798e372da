"""Iterative pruning over several fits, which ends before a metric drops too far."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Trainer
from lit import Lit, digits, seeded, trainer
from torch.utils.data import DataLoader

from lightning_prune import Guard, OneShot, PruningCallback, prune_to_goal
from lightning_prune.export.compacted import masks_in

SIZE = 4840  # weights in the matrices of Lit
PART = {"schedule": OneShot("1st"), "measure_seconds": 0, "write_report": False}


class Counted(Lit):
    """Logs which share of the weights in its matrices is not 0."""

    def train_dataloader(self) -> DataLoader[Any]:
        return digits(examples=128)

    def val_dataloader(self) -> DataLoader[Any]:
        return digits(examples=64)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("kept", 1 - zeros(self) / SIZE, batch_size=1)


def zeros(model: Lit) -> int:
    return sum(int((each == 0).sum()) for each in model.parameters() if each.ndim > 1)


def maker(folder: Path, **options: Any) -> Callable[[float], Trainer]:
    return lambda target: trainer(folder, PruningCallback(target, **PART | options), max_epochs=1)


def test_rounds_go_on_from_each_other_up_to_the_last_target(tmp_path: Path) -> None:
    model = seeded(Counted)
    result = prune_to_goal(maker(tmp_path), model, targets=[0.25, 0.5, 0.75], guard=Guard("kept", max_drop=0.9))
    assert result.dense == 1
    assert [(each.target, each.sparsity, each.good) for each in result.rounds] == [
        (share, share, True) for share in (0.25, 0.5, 0.75)
    ]
    assert zeros(model) == SIZE * 3 // 4
    assert result.callback.report.sparsity == 0.75
    result.trainer.save_checkpoint(tmp_path / "last.ckpt")
    masks = masks_in(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_a_round_that_is_too_bad_is_undone_and_tried_half_way(tmp_path: Path) -> None:
    model, seen = seeded(Counted), []

    def make(target: float) -> Trainer:
        seen.append(copy.deepcopy(model.state_dict()))
        return maker(tmp_path)(target)

    guard = Guard("kept", max_drop=0.55, patience=2)
    # pytest tells the other warnings again, so that none may be left out
    with (
        pytest.warns(
            UserWarning, match=r"Round 3, target=0\.8: kept 0\.2 is 0\.8 below the dense 1, more than"
        ),
        pytest.warns(UserWarning, match=r"Round 4, target=0\.6: .* max_drop=0\.55: back to target=0\.4"),
    ):
        result = prune_to_goal(make, model, targets=[0.2, 0.4, 0.8, 0.9], guard=guard)
    assert [(round(each.target, 9), each.good) for each in result.rounds] == [
        *((0.2, True), (0.4, True), (0.8, False), (0.6, False), (0.5, True))
    ]
    for later in seen[3:]:  # what the second round has left
        assert all(torch.equal(value, later[name]) for name, value in seen[2].items())
    assert zeros(model) == SIZE // 2
    assert sum(int((~mask).sum()) for mask in result.callback.masks.values()) == SIZE // 2


def test_without_a_good_round_the_dense_network_is_left(tmp_path: Path) -> None:
    model = seeded(Counted)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="back to target=0"):
        result = prune_to_goal(maker(tmp_path), model, targets=[0.5], guard=Guard("kept", max_drop=0.1))
    assert (result.trainer, result.callback) == (None, None)
    assert [each.good for each in result.rounds] == [False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, r"targets=\[\] must be a list of numbers"),
        ({"targets": [0.5, 1.0]}, r"targets=\[0\.5, 1\.0\] must be a list of numbers in \(0, 1\)"),
        ({"targets": 0.5}, r"targets=0\.5 must be a list"),
        ({"targets": [0.5, 0.5]}, r"targets=\[0\.5, 0\.5\] must rise"),
        ({"guard": "kept"}, r"guard='kept'"),
        ({"guard": Guard("other")}, r"monitor='other' must be one that validation logs: kept"),
        ({"options": {"compact": True}}, r"compact=True ends pruning after the first round"),
        ({"options": {"horizon": "5ep"}}, r"horizon='5ep' is for fits along one plan"),
        ({"fixed": 0.3}, r"make_trainer\(0\.5\) has returned .* target=0\.3"),
        ({"callbacks": 0}, r"prune_to_goal needs a Trainer with one PruningCallback, and this one has 0"),
        ({"same": True}, r"make_trainer\(0\.75\) has returned .* that has run before"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    kept: list[Trainer] = []

    def make(target: float) -> Trainer:
        if change.get("callbacks") == 0:
            return trainer(tmp_path)
        if change.get("same") and kept:
            kept[0].callbacks[0].target = target
            return kept[0]
        kept.append(maker(tmp_path, **change.get("options", {}))(change.get("fixed", target)))
        return kept[-1]

    settings = {"targets": [0.5, 0.75], "guard": Guard("kept", max_drop=1)}
    settings |= {name: value for name, value in change.items() if name in settings}
    with pytest.raises(ValueError, match=message):
        prune_to_goal(make, seeded(Counted), **settings)
