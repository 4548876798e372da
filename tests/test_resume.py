"""A fit that is stopped anywhere, and resumed, is bit for bit the fit that was not stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lit import same
from runs import BATCHES, EPOCHS, PARTS, EveryEpoch, EveryStep, resumable, run

SHARE = 3  # each kind is resumed from one of so many checkpoints


def test_without_pruning_lightning_resumes_exactly_but_for_one_place(tmp_path: Path) -> None:
    whole = run("no pruning", tmp_path, EveryStep(tmp_path), EveryEpoch(tmp_path))
    exact = resumable(tmp_path)
    assert len(exact) == EPOCHS * BATCHES
    for path in tmp_path.glob("*.ckpt"):
        assert same(run("no pruning", tmp_path, ckpt_path=path), whole) == (path in exact), path.name


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
    arguments = [sys.executable, str(Path(__file__).with_name("killed.py")), "--kills", "6", "--seed", "1"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(arguments, env=paths, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 of them differ" in done.stdout
