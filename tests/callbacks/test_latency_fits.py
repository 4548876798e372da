"""Targets in measured time in fits, oneshot, reports, checkpoints and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import NAME, Callback
from lit import Lit, fit, seeded, trainer
from quick import with_one_command
from test_cli import Data

from lightning_prune import Channels, Global, LatencyTable, OneShot, PruningCallback, Steps, oneshot
from lightning_prune.channels.latency import measurement
from lightning_prune.channels.latency.target import LatencyTarget
from lightning_prune.cli import cli_of
from lightning_prune.selectors import timing

# on a busy machine the few rounds of these tests may not suffice
pytestmark = [
    pytest.mark.filterwarnings("ignore:budget='latency'. timing was too noisy:UserWarning"),
    pytest.mark.filterwarnings("ignore:Reconstruct. .* rows of calibration data:UserWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning"),
]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure at three widths, in as few rounds as may be."""
    monkeypatch.setattr(measurement, "SECONDS", 0.0)


class Net(Lit):
    """Without an argument, and with its own example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 8, 8)


def callback(**settings: Any) -> PruningCallback:
    options: dict[str, Any] = {"schedule": Steps({"1ep": 0.5, "2ep": 1.0}), "measure_seconds": 0.02}
    selector = Global("latency", batch=2) if "selector" not in settings else settings.pop("selector")
    return PruningCallback(0.05, structure=Channels(), selector=selector, **options | settings)


def test_a_fit_measures_prunes_and_reports(tmp_path: Path) -> None:
    fit(tmp_path, seeded(Lit), pruning := callback(compact=True), max_epochs=3)
    target = pruning.report.latency_target
    assert target is not None
    assert (target.batch, target.wanted) == (2, 0.95)
    assert target.measured is not None
    assert target.measured_on == target.machine
    assert pruning.report.dense is not None
    assert pruning.report.params < pruning.report.dense.params
    assert str(target) in pruning.report.table()
    assert json.loads(pruning.report.to_json())["latency_target"]["batch"] == 2


def test_a_masked_network_is_not_timed_for_its_target(tmp_path: Path) -> None:
    run = fit(tmp_path, model := seeded(Lit), pruning := callback(), max_epochs=3)
    target = pruning.report.latency_target
    assert target is not None
    assert target.measured is target.missed is None
    run.save_checkpoint(path := tmp_path / "net.ckpt")
    state = torch.load(path, weights_only=True)["callbacks"]["PruningCallback"]
    assert pruning.report_of(model, state).latency_target == target


class Saves(Callback):
    """Saves a checkpoint after the first event, before the second."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def test_a_resumed_fit_takes_the_table_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.ckpt"
    fit(tmp_path, seeded(Lit), whole := callback(), Saves(path), max_epochs=3)
    state = torch.load(path, weights_only=True)["callbacks"]["PruningCallback"]
    assert state["pruner"]["latency_table"]["groups"] == {"net.0": 8, "net.4": 16}

    def measure_times(*arguments: Any) -> LatencyTable:
        raise AssertionError("measured again")

    monkeypatch.setattr(timing, "measure_times", measure_times)
    fit(tmp_path, seeded(Lit), resumed := callback(), max_epochs=3, ckpt_path=path)
    assert resumed.report.latency_target == whole.report.latency_target
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in resumed.masks.items())
    # with another batch size, others are needed
    again = callback(selector=Global("latency", batch=4))
    with pytest.raises(AssertionError, match="measured again"):
        fit(tmp_path, seeded(Lit), again, max_epochs=3, ckpt_path=path)


def test_oneshot_prunes_to_a_time(tmp_path: Path) -> None:
    pruning = callback(compact=True, schedule=OneShot("1ep"))
    run = trainer(tmp_path, pruning)
    found = oneshot(run, seeded(Net), Data(), batches=2)
    assert found.report.latency_target is not None
    assert found.report.latency_target.measured is not None


def test_a_table_of_the_command_line_serves_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "table.json"
    quiet = [
        "--seed_everything",
        "0",
        "--trainer.logger",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--pruning.target",
        "0.05",
    ]
    structure = ["--pruning.structure", "Channels"]
    with_one_command(cli_of(NAME), "latency")(
        Net, None, args=["latency", *quiet, *structure, "--out", str(path), "--batch", "3"]
    )
    assert "batch of 3>" in capsys.readouterr().out
    table = LatencyTable.load(path)
    assert (table.batch, table.groups) == (3, {"net.0": 8, "net.4": 16})
    replace(table, machine="cpu: elsewhere", error=0.0).save(path)
    selector = ["--pruning.selector", "Global", "--pruning.selector.budget", "latency"]
    given = ["--pruning.selector.table", str(path)]
    with_one_command(cli_of(NAME), "plan")(Net, None, args=["plan", *quiet, *structure, *selector, *given])
    assert "layer" in capsys.readouterr().out


def test_the_report_says_by_how_much_a_target_was_missed_and_why() -> None:
    target = LatencyTarget(1, wanted=0.5, expected=0.51, machine="cpu: here", error=0.01)
    assert str(target).endswith("50.0% of the dense network's wanted, 51.0% by the table of cpu: here")
    assert str(target.met_by(0.52, "cpu: here")).endswith("met to within 5%")
    assert target.met_by(0.52, "cpu: here").missed == pytest.approx(0.04)
    missed = str(target.met_by(0.6, "cpu: here"))
    assert "60.0% measured in turn" in missed
    assert "20.0% more than wanted, because the table is 1.0% (median) from" in missed
    assert "measured on another machine, cuda: there" in str(target.met_by(0.4, "cuda: there"))
    assert "20.0% less than wanted" in str(target.met_by(0.4, "cuda: there"))
    assert "because whole units" in str(replace(target, expected=0.7).met_by(0.7, "cpu: here"))
