"""Trains, prunes and compacts in two processes: run by tests, since each starts the program anew."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightnings import Callback, ModelParallelStrategy
from lit import Lit, fit, seeded
from quick import draw_nothing, time_latency_quickly
from torch.optim import SGD

import lightning_prune
from lightning_prune import Channels, Criterion, Global, PruningCallback


class Configured(Lit):
    """ModelParallelStrategy wants to be told how, which is another matter; what spawns has to pickle it."""

    def __init__(self) -> None:
        super().__init__(partial(SGD, lr=0.05, momentum=0.9))

    def configure_model(self) -> None:
        pass


class Keep(Callback):
    """What the first batch told."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.statistics: dict[str, Any] = {}

    def on_train_batch_end(self, *_: Any) -> None:
        self.statistics = self.statistics or copy.deepcopy(self.pruning.state_dict()["pruner"]["statistics"])


def run(folder: Path, name: str, criterion: Criterion) -> None:
    """Train under one strategy, and leave weights, statistics and a checkpoint in a folder."""
    folder.mkdir(exist_ok=True)
    strategy = ModelParallelStrategy() if name == "ModelParallelStrategy" else name
    model = seeded(Configured)
    callback = PruningCallback(
        0.5,
        criterion=criterion,
        structure=Channels(),
        selector=Global(budget="macs"),
        compact=name != "ddp_spawn",
    )
    keep = Keep(callback)
    trainer = fit(folder, model, callback, keep, strategy=strategy, devices=2)
    torch.save(dict(model.named_parameters()), folder / f"rank{trainer.global_rank}.pt")
    torch.save(keep.statistics, folder / f"statistics{trainer.global_rank}.pt")
    trainer.save_checkpoint(folder / "small.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    time_latency_quickly()
    draw_nothing()
    try:
        for criterion in sys.argv[3:]:
            run(Path(sys.argv[1]) / criterion, sys.argv[2], getattr(lightning_prune, criterion)())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads may abort the process as the interpreter exits
