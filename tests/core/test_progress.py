"""Progress bars: on terminals alone, and as the Trainer says."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import LightningDataModule, ProgressBar
from lit import Lit, digits, trainer
from torch import nn

from lightning_prune import (
    Channels,
    OneShot,
    Oracle,
    Pruner,
    PruningCallback,
    Reconstruct,
    compact,
    measure_latency,
    oneshot,
    sensitivity,
)
from lightning_prune.channels.latency import measurement
from lightning_prune.core import progress

pytestmark = pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data")
PRUNING = ["Find channels", "Oracle(", "Reconstruct", "Prove that outputs stay the same"]


class Screen(io.StringIO):
    """Standard error: a terminal, or a file."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(measurement, "SECONDS", 0.05)
    monkeypatch.setattr(measurement, "LEVELS", (3,))


def shown(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], *, terminal: bool = True) -> list[str]:
    """Returns what kinds of work have shown a progress bar."""
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=terminal))
    torch.manual_seed(0)
    work()
    return [what for what in [*PRUNING, "Prune one layer", "Measure latency"] if what in screen.getvalue()]


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return digits()


class Silent(ProgressBar):
    """Lightning's progress bar, which shows nothing of its own."""


def in_trainer(folder: Path, run_it: Callable[[Any, Lit], object], *callbacks: Any, **options: Any) -> None:
    pruning = PruningCallback(
        0.4,
        criterion=Oracle(1),
        structure=Channels(),
        schedule=OneShot("1st"),
        reconstruct=Reconstruct(1),
        compact=True,
        write_report=False,
        measure_seconds=0,
    )
    run_it(trainer(folder, pruning, *callbacks, max_steps=2, **options), Lit())


@pytest.mark.parametrize(
    "run_it",
    [lambda run, model: run.fit(model, digits()), lambda run, model: oneshot(run, model, Data())],
    ids=["fit", "oneshot"],
)
def test_long_work_has_a_bar_if_the_trainer_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_it: Any
) -> None:
    work = partial(in_trainer, tmp_path, run_it, Silent(), enable_progress_bar=True)
    assert shown(monkeypatch, work) == PRUNING
    assert shown(monkeypatch, work, terminal=False) == []
    assert shown(monkeypatch, partial(in_trainer, tmp_path, run_it)) == []


def test_long_work_has_a_bar_without_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Lit().net, next(iter(digits()))[0]

    def prune() -> nn.Module:
        pruner = Pruner(model, 0.5, structure=Channels(), schedule=None, example=images[:2])
        pruner.prune(1.0, reconstruct=Reconstruct(), batches=[images])
        return compact(model, pruner.masks, images[:2])

    times = partial(measure_latency, model, images[:1])
    find = partial(sensitivity, model, lambda _: 1.0, ratios=[0.5], structure=Channels(), example=images[:2])
    assert shown(monkeypatch, prune) == ["Find channels", "Reconstruct", "Prove that outputs stay the same"]
    assert shown(monkeypatch, prune, terminal=False) == []
    assert shown(monkeypatch, times) == ["Find channels", "Measure latency"]
    assert shown(monkeypatch, find) == ["Find channels", "Prune one layer"]
    assert shown(monkeypatch, partial(find, progress=False)) == []


def test_short_passes_are_counted_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 60.0)
    model, rows = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(2, 4)
    assert shown(monkeypatch, lambda: Channels().units(model, rows)) == []
