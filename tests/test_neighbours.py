"""Beside other callbacks, and under the flags of a Trainer: tuners, limits, interruptions."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lit import Lit, digits, hooks, same, seeded, trainer
from torch.optim import SGD

from lightning_prune import Channels, Linear, OneShot, PruningCallback, Taylor

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


def pruner(kind: str) -> PruningCallback:
    return KINDS[kind](criterion=Taylor(), schedule=EVENTS)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tuners_leave_no_trace(tmp_path_factory: pytest.TempPathFactory, kind: str, tuner: str) -> None:
    folder, found = tmp_path_factory.getbasetemp(), TUNERS[tuner]()
    if kind == "channels":
        assert same(tuned(folder, pruner(kind), found), untuned(folder, kind))
    else:
        assert same(tuned(folder, pruner(kind), after=(found,)), untuned(folder, kind))


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
