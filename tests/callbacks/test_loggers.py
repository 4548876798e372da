"""Loggers get the same names and values, read back with each tool's own reader."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from lightnings import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit import Lit, fit

from lightning_prune import OneShot, PruningCallback

Values: TypeAlias = dict[str, tuple[int | None, float]]  # name to step, where it can be read, and value
Logged: TypeAlias = tuple[Any, Callable[[], Values]]  # a logger, and what reads it

NAMES = {f"prune/sparsity{layer}" for layer in ("", *(f"/net.{place}.weight" for place in (0, 4, 6)))}


def in_csv(folder: Path) -> Logged:
    logger = CSVLogger(folder)

    def read() -> Values:
        with (Path(logger.log_dir) / "metrics.csv").open() as lines:
            return {
                name: (int(row["step"]), float(value))
                for row in csv.DictReader(lines)
                for name, value in row.items()
                if value
            }

    return logger, read


def in_tensorboard(folder: Path) -> Logged:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    logger = TensorBoardLogger(folder)

    def read() -> Values:
        events = reader.EventAccumulator(logger.log_dir).Reload()
        return {
            name: (event.step, event.value)
            for name in events.Tags()["scalars"]
            for event in events.Scalars(name)
        }

    return logger, read


def in_mlflow(folder: Path) -> Logged:
    pytest.importorskip("mlflow", reason="needs mlflow")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder))

    def read() -> Values:
        client = logger.experiment
        return {
            name: (each.step, each.value)
            for name in client.get_run(logger.run_id).data.metrics
            for each in client.get_metric_history(logger.run_id, name)
        }

    return logger, read


def in_wandb(folder: Path) -> Logged:
    pytest.importorskip("wandb", reason="needs wandb")
    logger = WandbLogger(save_dir=folder, offline=True)

    def read() -> Values:
        summary = dict(logger.experiment.summary)
        logger.experiment.finish()
        return {name: (None, value) for name, value in summary.items()}

    return logger, read


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("make", [in_csv, in_tensorboard, in_mlflow, in_wandb])
def test_all_loggers_get_the_same_names_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Logged]
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, read = make(tmp_path)
    pruning = PruningCallback(0.5, schedule=OneShot("1ep"), measure_seconds=0)
    fit(tmp_path, Lit(), pruning, max_epochs=2, logger=logger)
    found = {name: value for name, value in read().items() if name.startswith("prune/")}
    assert found.keys() == NAMES
    assert {step for step, _ in found.values()} <= {5, None}
    removed = {f"prune/sparsity/{each.name}": 1 - each.kept / each.size for each in pruning.report.layers}
    for name, value in {**removed, "prune/sparsity": 0.5}.items():
        assert found[name][1] == pytest.approx(value)
