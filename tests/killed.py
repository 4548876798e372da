"""Kills fits at random moments, resumes them, and compares what they leave with a fit that was not stopped.

    PYTHONPATH=recipes python tests/killed.py --kills 50 --seed 0

A moment is the n-th call of a function: anywhere in the fit, in pruning events, or while checkpoints are saved.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from lightnings import NAME, Trainer
from lit import same
from quick import draw_nothing, time_latency_quickly
from runs import PARTS, EveryEpoch, EveryStep, resumable, run

from lightning_prune import Pruner

PLACES: dict[str, CodeType | None] = {
    "anywhere": None,
    "event": unwrap(Pruner.prune).__code__,
    "save": Trainer.save_checkpoint.__code__,
}


class Calls:
    """Counts calls of functions, of Python and C, and kills the process at one of them.

    Args:
        place: In which function they count, calls of calls included.
        last: Which one kills.
    """

    def __init__(self, place: str, last: int | None = None) -> None:
        self._code = PLACES[place]
        self._inside = int(self._code is None)
        self._last = last
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and frame.f_code is self._code:
            self._inside += 1 if event == "call" else -1
        if self._inside and event in ("call", "c_call"):
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Does work in a process of its own, and gives its exit status: below 0 if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(Exception), Path(os.devnull).open("w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                work()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(name: str, folder: Path, calls: Calls | None = None) -> None:
    """Trains to the end, from the last checkpoint on if there is one, and writes what is left."""
    found = resumable(folder)
    sys.setprofile(calls)
    left = run(name, folder, EveryStep(folder), EveryEpoch(folder), ckpt_path=found[-1] if found else None)
    sys.setprofile(None)
    torch.save(left, folder / "left.pt")


def count(name: str, place: str, folder: Path) -> int:
    """How many moments there are."""

    def work() -> None:
        calls = Calls(place)
        train(name, folder, calls)
        (folder / "count").write_text(str(calls.count))

    assert in_child(work) == 0
    return int((folder / "count").read_text())


def kill_and_compare(name: str, place: str, draw: random.Random, folder: Path) -> tuple[str, int, list[str]]:
    """Kills a fit, and the one that resumes it, if that comes so far.

    Returns:
        At which calls, how often it was killed, and what differs in the end.
    """
    whole, stopped = folder / "whole", folder / "stopped"
    whole.mkdir()
    stopped.mkdir()
    calls = count(name, place, whole)
    moments = [draw.randint(1, calls) for _ in range(2)]
    kills = sum(
        in_child(lambda: train(name, stopped, Calls(place, moment))) == -signal.SIGKILL  # noqa: B023
        for moment in moments
    )
    assert in_child(lambda: train(name, stopped)) == 0, f"{name}: cannot be resumed after {place} {moments}"
    left, other = (torch.load(each / "left.pt", weights_only=True) for each in (whole, stopped))
    differ = [key for key in left if not same(left[key], other[key])]
    return f"{moments[0]:,} and {moments[1]:,}", kills, differ


def main() -> None:
    """Kills, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="at least so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    logging.getLogger(NAME).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # a process with threads cannot be forked
    time_latency_quickly()
    draw_nothing()
    draw = random.Random(options.seed)
    trials = [(name, place) for name in PARTS if name != "no pruning" for place in PLACES]
    draw.shuffle(trials)
    kills = different = done = 0
    while kills < options.kills:
        name, place = trials[done % len(trials)]
        done += 1
        folder = Path(tempfile.mkdtemp())
        try:
            moments, killed, differ = kill_and_compare(name, place, draw, folder)
        finally:
            shutil.rmtree(folder)
        kills += killed
        different += bool(differ)
        print(
            f"{name}, {place}: killed {killed} times, at call {moments}; differs: {differ or 'nothing'}",
            flush=True,
        )
    print(f"{kills} kills of {done} fits; {different} of them differ in the end")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
