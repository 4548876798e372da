"""A fit that is stopped anywhere, and resumed, is bit for bit the fit that was not stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import digits, same, seeded, trainer
from resumable import RandomState, ResumableLoader
from runs import BATCHES, EPOCHS, PARTS, EveryEpoch, EveryStep, Noisy, resumable, run

from lightning_prune import OneShot, PruningCallback, Taylor

SHARE = 10  # each kind is resumed from one of so many checkpoints


def test_without_pruning_lightning_resumes_exactly_but_for_one_place(tmp_path: Path) -> None:
    whole = run("no pruning", tmp_path, EveryStep(tmp_path), EveryEpoch(tmp_path))
    exact = resumable(tmp_path)
    assert len(exact) == EPOCHS * BATCHES
    for path in tmp_path.glob("*.ckpt"):
        assert same(run("no pruning", tmp_path, ckpt_path=path), whole) == (path in exact), path.name


def test_looking_at_a_batch_when_all_is_done_leaves_the_loader_where_it_was(tmp_path: Path) -> None:
    """Stopped in mid-epoch, and resumed there with nothing left to do."""

    def place(ckpt_path: Path | None) -> Any:
        pruning = PruningCallback(0.5, criterion=Taylor(), schedule=OneShot("2st"))
        fit = trainer(tmp_path, pruning, RandomState(), max_epochs=-1, max_steps=7)
        fit.fit(seeded(Noisy), ResumableLoader(digits().dataset, 64), ckpt_path=ckpt_path)
        assert pruning.report.macs is not None
        fit.save_checkpoint(tmp_path / "last.ckpt")
        return torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]

    assert place(None) == place(tmp_path / "last.ckpt")
    assert place(tmp_path / "last.ckpt")["combined_loader"] == [{"done": 2}]


@pytest.mark.filterwarnings("ignore:epoch .* max_drop:UserWarning")
@pytest.mark.parametrize("name", [name for name in PARTS if name != "no pruning"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, name: str) -> None:
    whole = run(name, tmp_path, EveryStep(tmp_path), EveryEpoch(tmp_path))
    exact = resumable(tmp_path)
    assert len(exact) == EPOCHS * BATCHES
    for path in [*exact[list(PARTS).index(name) % SHARE : -1 : SHARE], exact[-1]]:
        again = run(name, tmp_path, ckpt_path=path)
        assert [key for key in whole if not same(whole[key], again[key])] == [], path.name


def test_a_killed_run_is_the_run_that_was_not_stopped() -> None:
    arguments = [sys.executable, str(Path(__file__).with_name("killed.py")), "--kills", "4", "--seed", "1"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, env=paths, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 of them differ" in done.stdout
