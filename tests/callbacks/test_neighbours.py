"""Beside other callbacks, and under the flags of a Trainer: tuners, limits, interruptions."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, loose, masked
from lightnings import (
    BatchSizeFinder,
    Callback,
    CSVLogger,
    EarlyStopping,
    LearningRateFinder,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    Tuner,
)
from lit import Lit, digits, hooks, same, seeded, trainer
from torch.optim import SGD

from lightning_prune import (
    Channels,
    Linear,
    OneShot,
    PrunedEarlyStopping,
    PruningCallback,
    Rewind,
    Steps,
    Taylor,
)

EVENTS = Linear("1ep", "3ep", every="1ep")


# --- tuners train for a while, and bring back a checkpoint of their own


class Tunable(Lit):
    """Has its own data, and what tuners look for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.05, 64

    def train_dataloader(self) -> Any:
        return digits(self.batch_size)

    def val_dataloader(self) -> Any:
        return digits(self.batch_size, examples=100)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), self.lr, momentum=0.9)


class Later(LearningRateFinder):
    """Searches at the beginning of an epoch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


SEARCH: dict[str, Any] = {"num_training_steps": 3, "update_attr": False}
TUNERS: dict[str, Any] = {
    "learning rate": lambda: LearningRateFinder(**SEARCH),
    "learning rate, later": lambda: Later(**SEARCH),
    "batch size": lambda: BatchSizeFinder(init_val=64, max_trials=1),
}


def tuned(folder: Path, pruning: PruningCallback, *before: Any, after: tuple[Any, ...] = ()) -> Any:
    """A network after two fits of four epochs, the callback's state, and what is saved on the way."""
    saved: list[Any] = []

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path = folder / "epoch.ckpt"
            trainer.save_checkpoint(path)
            saved.append(torch.load(path, weights_only=True)["callbacks"]["PruningCallback"])

    model = seeded(Tunable)
    for _ in range(2):
        run = trainer(folder, *before, pruning, *after, Save())
        run.fit(model)
    assert hooks(model, run) == 0
    return dict(model.state_dict()), pruning.state_dict(), saved


@cache
def untuned(folder: Path, kind: str) -> Any:
    return tuned(folder, pruner(kind))


@cache
def leaves_batches(folder: Path, tuner: str) -> bool:
    """Whether a fit has all of its batches after a search; Lightning 2.5.0 lacks those that were tried."""
    run = trainer(folder, TUNERS[tuner]())
    run.fit(seeded(Tunable))
    return run.global_step == 20


def pruner(kind: str) -> PruningCallback:
    return KINDS[kind](criterion=Taylor(), schedule=EVENTS)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tuners_leave_no_trace(tmp_path_factory: pytest.TempPathFactory, kind: str, tuner: str) -> None:
    folder, pruning, found = tmp_path_factory.getbasetemp(), pruner(kind), TUNERS[tuner]()
    first = kind == "channels"
    with_it = tuned(folder, pruning, *(found,) * first, after=(found,) * (not first))
    if leaves_batches(folder, tuner):
        assert same(with_it, untuned(folder, kind))
    else:
        assert [entry.epoch for entry in pruning.report.history] == [1, 2, 3] * 2
        assert [entry.sparsity > 0 for entry in pruning.report.history] == [False] + [True] * 5


def test_a_tuner_leaves_a_compacted_network_as_it_is(tmp_path: Path) -> None:
    pruning = PruningCallback(0.5, structure=Channels(), schedule=OneShot("1ep"), compact=True)
    run = trainer(tmp_path, pruning, max_epochs=2)
    run.fit(model := seeded(Tunable))
    before, state, report = deepcopy(model.state_dict()), deepcopy(pruning.state_dict()), pruning.report
    again = trainer(tmp_path, pruning, max_epochs=2)
    Tuner(again).lr_find(model, num_training=3, update_attr=False)
    assert same(dict(model.state_dict()), dict(before))
    assert same(pruning.state_dict(), state)
    assert pruning.report == report
    again = trainer(tmp_path, LearningRateFinder(**SEARCH), pruning, max_epochs=2)
    again.fit(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    assert pruning.report == report


# --- errors and Ctrl-C, in each hook, also in the middle of an event


class Raise(Callback):
    """Raises in one hook, from the second epoch on."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def fail(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.current_epoch >= 2:
                raise error

        setattr(self, hook, fail)


HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_save_checkpoint",
]


def check_whole(pruning: PruningCallback, model: Lit, run: Trainer, folder: Path) -> None:
    """Nothing is left on a network whose fit broke off; it can be saved, and trained on to the end."""
    assert hooks(model, run) == 0
    assert "on_load_checkpoint" not in vars(model)
    assert loose(pruning, model) == 0
    assert pruning.report.removed == masked(pruning) > 0
    run.callbacks = [pruning]
    run.save_checkpoint(folder / "broken.ckpt")
    again = trainer(folder, pruning)
    again.fit(model, digits(), digits(examples=100))
    assert loose(pruning, model) == 0
    assert pruning.report.history[-1].sparsity == pruning.report.sparsity
    resumed = pruner("weights")
    longer = trainer(folder, resumed, max_epochs=6)
    longer.fit(other := Lit(), digits(), ckpt_path=folder / "broken.ckpt")
    assert loose(resumed, other) == 0
    assert masked(resumed) == masked(pruning)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_error_in_a_hook_leaves_nothing_half_done(tmp_path: Path, hook: str) -> None:
    pruning = pruner("weights")
    run = trainer(tmp_path, pruning, Raise(hook, RuntimeError("broken")))
    keep = {"on_save_checkpoint": [ModelCheckpoint(tmp_path)]}.get(hook, [])
    run.callbacks += keep
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(model := seeded(Lit), digits(), digits(examples=100))
    check_whole(pruning, model, run, tmp_path)


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_an_error_of_a_logger_in_an_event_leaves_nothing_half_done(
    tmp_path: Path, error: BaseException
) -> None:
    class Breaks(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if metrics.get("prune/sparsity", 0) > 0:
                raise error

    pruning = pruner("weights")
    run = trainer(tmp_path, pruning, logger=Breaks(tmp_path))
    with pytest.raises((OSError, SystemExit)):
        run.fit(model := seeded(Lit), digits(), digits(examples=100))
    assert [entry.epoch for entry in pruning.report.history if entry.sparsity > 0] == [2]
    check_whole(pruning, model, run, tmp_path)


class Stubborn(SGD):
    """Does not go back."""

    def load_state_dict(self, state_dict: Any) -> None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_while_weights_go_back_leaves_masks_in_force(tmp_path: Path, kind: str) -> None:
    pruning = KINDS[kind](schedule=EVENTS, rewind=Rewind())
    run = trainer(tmp_path, pruning)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(model := seeded(lambda: Lit(lambda p: Stubborn(p, 0.05))), digits())
    assert hooks(model, run) == 0
    assert masked(pruning) > 0
    assert loose(pruning, model) == 0


# --- evaluation, and limits


class Whole(Tunable):
    """Can be tested and predicts, too."""

    test_step = Lit.validation_step
    test_dataloader = Tunable.val_dataloader

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_changes_nothing(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    folder = tmp_path_factory.getbasetemp()

    def all_of_it(run: Trainer, model: LightningModule) -> None:
        before = deepcopy((dict(model.state_dict()), pruning.state_dict()))
        run.validate(model, verbose=False)
        run.test(model, verbose=False)
        run.predict(model, digits())
        assert same((dict(model.state_dict()), pruning.state_dict()), before)
        assert hooks(model, run) == 0

    pruning = pruner(kind)
    model = seeded(Whole)
    all_of_it(trainer(folder, pruning), model)
    for _ in range(2):
        run = trainer(folder, pruning)
        run.fit(model)
        all_of_it(run, model)
    assert same(dict(model.state_dict()), untuned(folder, kind)[0])


class Shrinking(Tunable):
    """Has fewer batches in each epoch."""

    def train_dataloader(self) -> Any:
        return digits(64, examples=64 * (5 - self.current_epoch))


@pytest.mark.parametrize(
    ("kind", "make", "options", "steps"),
    [
        ("weights", Tunable, {"limit_train_batches": 3}, [3, 6, 9]),
        ("channels", Tunable, {"limit_train_batches": 0.4}, [2, 4, 6]),
        ("2:4", Tunable, {"overfit_batches": 2}, [2, 4, 6]),
        ("weights", Tunable, {"val_check_interval": 2}, [5, 10, 15]),
        ("channels", Tunable, {"val_check_interval": 7, "check_val_every_n_epoch": None}, [5, 10, 15]),
        ("2:4", Tunable, {"check_val_every_n_epoch": 3}, [5, 10, 15]),
        ("weights", Shrinking, {"reload_dataloaders_every_n_epochs": 1}, [5, 9, 12]),
        ("channels", Tunable, {"max_steps": 18}, [5, 10, 15]),
        ("2:4", Tunable, {"min_epochs": 4, "max_time": {"seconds": 0}}, [5, 10, 15]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_events_are_where_the_schedule_says_under_limits(
    tmp_path: Path, kind: str, make: type[Lit], options: dict[str, Any], steps: list[int]
) -> None:
    pruning = pruner(kind)
    trainer(tmp_path, pruning, **options).fit(model := make())
    assert [entry.step for entry in pruning.report.history] == steps
    assert loose(pruning, model) == 0
    assert masked(pruning) == pruning.report.removed > 0


def test_a_fit_without_time_warns_and_prunes_nothing(tmp_path: Path) -> None:
    pruning = pruner("weights")
    run = trainer(tmp_path, pruning, max_time={"seconds": 0})
    with pytest.warns(UserWarning, match="ended before its first batch"):
        run.fit(model := Tunable())
    assert pruning.state_dict() == {}
    assert hooks(model, run) == 0


DIP = Steps({"2ep": 0.98, "4ep": 1.0})


def test_early_stopping_may_stop_in_the_dip_after_an_event_and_that_is_said(tmp_path: Path) -> None:
    """It compares with the dense network."""
    pruning = PruningCallback(0.95, schedule=DIP)
    run = trainer(tmp_path, pruning, EarlyStopping("acc", mode="max", patience=1), max_epochs=6)
    with pytest.warns(UserWarning, match="before the last pruning event.* PrunedEarlyStopping waits"):
        run.fit(seeded(Tunable))
    assert run.current_epoch == 3
    assert not pruning.settled


@pytest.mark.parametrize("at_epoch_end", [True, False])
@pytest.mark.parametrize(("patience", "epochs"), [(1, 6), (2, 7)])
def test_stopping_early_waits_for_the_last_event(
    tmp_path: Path, patience: int, epochs: int, at_epoch_end: bool
) -> None:
    """With a metric that only falls, the first at the final sparsity is the best."""

    class Falling(Tunable):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("acc", -float(self.current_epoch))

    pruning = PruningCallback(0.95, schedule=DIP)
    stop = PrunedEarlyStopping("acc", mode="max", patience=patience, check_on_train_epoch_end=at_epoch_end)
    run = trainer(tmp_path, pruning, stop, max_epochs=9)
    run.fit(seeded(Falling))
    assert pruning.settled
    assert float(stop.best_score) == -4
    assert run.current_epoch == epochs
