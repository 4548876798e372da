"""What judges a network only once it is pruned in full, across resumes and beside a guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import Callback, EarlyStopping, LightningModule, ModelCheckpoint, Trainer
from lit import Lit, fit, seeded

from lightning_prune import Channels, Guard, OneShot, PrunedCheckpoint, PrunedEarlyStopping, PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
SCHEDULE = OneShot("1ep")
SIZE = 72 + 4608 + 160


def scripted(values: list[float]) -> Lit:
    """Logs these values, one an epoch."""

    class Scripted(Lit):
        def on_validation_epoch_end(self) -> None:
            self.log("score", values[self.current_epoch])

    return seeded(Scripted)


def stopping(patience: int = 1, **options: Any) -> PrunedEarlyStopping:
    return PrunedEarlyStopping("score", mode="max", patience=patience, **options)


def keeping(folder: Path) -> PrunedCheckpoint:
    return PrunedCheckpoint(folder, filename="best-{epoch}", monitor="score", mode="max")


def test_the_best_of_an_earlier_fit_at_a_lower_sparsity_does_not_count(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    first = PruningCallback(0.5, schedule=SCHEDULE), stopping(), keeping(tmp_path), every
    fit(tmp_path, scripted([0.9, 0.9]), *first, max_epochs=2, enable_checkpointing=True)
    stop, keep = stopping(), keeping(tmp_path)
    values = [0.9, 0.9, 0.5, 0.6, 0.7, 0.6]
    pruning = PruningCallback(0.9, schedule=SCHEDULE)
    path = tmp_path / "epoch=1.ckpt"
    run = fit(
        tmp_path, scripted(values), pruning, stop, keep, ckpt_path=path, max_epochs=6, enable_checkpointing=True
    )
    assert run.current_epoch == 6  # not in the dip
    assert (float(stop.best_score), float(keep.best_model_score)) == pytest.approx((0.7, 0.7))
    saved = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert sum(int((saved[name] == 0).sum()) for name in pruning.masks) == round(0.9 * SIZE)


def test_the_best_at_the_same_sparsity_counts_after_a_resume(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    first = PruningCallback(0.5, schedule=SCHEDULE), stopping(), keeping(tmp_path), every
    fit(tmp_path, scripted([0.5, 0.9, 0.8]), *first, max_epochs=3, enable_checkpointing=True)
    stop, keep = stopping(patience=2), keeping(tmp_path)
    pruning = PruningCallback(0.5, schedule=SCHEDULE)
    path = tmp_path / "epoch=2.ckpt"
    values = [0.5, 0.9, 0.8, 0.7, 0.7]
    run = fit(
        tmp_path, scripted(values), pruning, stop, keep, ckpt_path=path, max_epochs=5, enable_checkpointing=True
    )
    assert run.current_epoch == 4
    assert Path(keep.best_model_path).stem == "best-epoch=1"


def test_before_the_last_event_only_what_is_missing_or_not_finite_matters(tmp_path: Path) -> None:
    last = OneShot("4ep")
    goal = stopping(stopping_threshold=0.1, divergence_threshold=0.05)
    run = fit(
        tmp_path,
        scripted([0.9, 0.01, 0.01, 0.01, 0.08, 0.9]),
        PruningCallback(0.5, schedule=last),
        goal,
        max_epochs=6,
    )
    assert run.current_epoch == 6
    with pytest.warns(UserWarning, match="the target is not reached"):
        run = fit(
            tmp_path,
            scripted([0.9, float("nan"), 0.9]),
            PruningCallback(0.5, schedule=last),
            stopping(),
            max_epochs=6,
        )
    assert run.current_epoch == 2
    typo = PrunedEarlyStopping("scor", mode="max")
    with pytest.raises(RuntimeError, match="metric `scor` which is not available"):
        fit(tmp_path, scripted([0.9] * 6), PruningCallback(0.5, schedule=last), typo, max_epochs=6)


class Halt(Callback):
    """Ends the fit after the first epoch, as a time limit would."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("watch", "halt", "hint"),
    [
        (EarlyStopping("score", mode="max", patience=0), False, True),
        (EarlyStopping("score", mode="max", patience=0), True, False),
        (PrunedEarlyStopping("score", mode="max", patience=0), True, False),
    ],
)
def test_early_stopping_is_named_only_where_it_ended_the_fit(
    tmp_path: Path, watch: Any, halt: bool, hint: bool
) -> None:
    callbacks = [PruningCallback(0.5, schedule=OneShot("3ep")), watch, *([Halt()] if halt else [])]
    with pytest.warns(UserWarning, match="the target is not reached") as warned:
        fit(tmp_path, scripted([0.9, 0.8, 0.7, 0.6]), *callbacks)
    assert any("EarlyStopping ended it: Pruned" in str(each.message) for each in warned) == hint


# as Lightning 2.5 says before the first validation
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_a_metric_from_before_the_last_event_does_not_count(tmp_path: Path) -> None:
    """Between the event and the first validation after it, the dense network's is still there."""
    options = {"monitor": "score", "mode": "max", "every_n_train_steps": 2, "save_top_k": 1}
    keep = PrunedCheckpoint(tmp_path, filename="best-{step}", **options)
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"))
    fit(tmp_path, scripted([0.9, 0.9, 0.3, 0.4]), pruning, keep, enable_checkpointing=True)
    assert float(keep.best_model_score) == pytest.approx(0.3)  # of the last epoch's steps


def test_limits_are_as_before_after_a_look_that_fails(tmp_path: Path) -> None:
    stop = PrunedEarlyStopping("scor", mode="max", stopping_threshold=1.0, divergence_threshold=0.0, patience=2)
    with pytest.raises(RuntimeError, match="not available"):
        fit(tmp_path, scripted([0.9] * 4), PruningCallback(0.5, schedule=OneShot("2ep")), stop)
    assert (stop.stopping_threshold, stop.divergence_threshold, stop.patience) == (1.0, 0.0, 2)


def test_nan_before_the_last_event_stops_only_if_that_is_wanted(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, schedule=OneShot("2ep"))
    stop = stopping(check_finite=False)
    run = fit(tmp_path, scripted([0.9, float("nan"), 0.5, 0.6]), pruning, stop)
    assert run.current_epoch == 4
    assert float(stop.best_score) == pytest.approx(0.6)


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("save_last", [True, "link"])
def test_what_came_back_is_saved_also_if_nothing_is_left_to_train(tmp_path: Path, save_last: Any) -> None:
    def callbacks() -> tuple[PruningCallback, PrunedCheckpoint]:
        guard = Guard("score", max_drop=0.25)
        keep = PrunedCheckpoint(
            tmp_path, filename="best-{epoch}", monitor="score", mode="max", save_last=save_last
        )
        return PruningCallback(0.5, schedule=SCHEDULE, guard=guard), keep

    values = [0.9, 0.9, 0.9, 0.1]
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    for path in (None, tmp_path / "epoch=3.ckpt"):
        pruning, keep = callbacks()
        fit(tmp_path, scripted(values), pruning, keep, every, ckpt_path=path, enable_checkpointing=True)
        assert pruning.undone
        for saved in (keep.best_model_path, keep.last_model_path):
            weights = torch.load(saved, weights_only=True)["state_dict"]
            assert all(bool((weights[name] != 0).all()) for name in pruning.masks)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_a_guard_judges_before_the_fit_is_stopped(tmp_path: Path, first: bool, at_epoch_end: bool) -> None:
    guard = Guard("score", max_drop=0.25, patience=3)
    pruning = PruningCallback(0.5, structure=Channels(), schedule=SCHEDULE, guard=guard)
    stop = stopping(patience=9, check_on_train_epoch_end=at_epoch_end)
    order = (stop, pruning) if first else (pruning, stop)
    run = fit(tmp_path, scripted([0.9, 0.1, 0.8, 0.75]), *order)  # the second one is no good
    assert float(stop.best_score) == pytest.approx(0.8)
    assert stop.wait_count == 1
    assert run.callbacks.index(stop) > run.callbacks.index(pruning)
    assert len(run.callbacks) == len(set(run.callbacks))
