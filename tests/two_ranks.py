"""Trains, prunes and compacts in two processes: run by tests, since each starts the program anew."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lit import Lit, fit, seeded

import lightning_prune
from lightning_prune import Channels, Global, PruningCallback


class Configured(Lit):
    """ModelParallelStrategy wants to be told how, which is another matter."""

    def configure_model(self) -> None:
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    strategy = ModelParallelStrategy() if name == "ModelParallelStrategy" else name
    model = seeded(Configured)
    criterion = getattr(lightning_prune, sys.argv[3])()
    callback = PruningCallback(
        0.5, criterion=criterion, structure=Channels(), selector=Global(budget="macs"), compact=True
    )
    trainer = fit(folder, model, callback, strategy=strategy, devices=2)
    torch.save(dict(model.named_parameters()), folder / f"rank{trainer.global_rank}.pt")
    trainer.save_checkpoint(folder / "small.ckpt")
