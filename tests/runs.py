"""Fits that can be resumed bit for bit, one for each kind of state that pruning keeps, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightnings import Callback, ModelCheckpoint
from lit import Lit, digits, seeded, trainer
from resumable import RandomState, ResumableLoader
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import (
    ActivationTaylor,
    Channels,
    Cubic,
    Global,
    Gradient,
    Guard,
    NofM,
    OneShot,
    OptimalBrainDamage,
    OptimalBrainSurgeon,
    ParticleFilter,
    PerLayer,
    PruningCallback,
    Reconstruct,
    Rewind,
    Steps,
    Taylor,
    Wanda,
)

EPOCHS, BATCHES = 4, 5
SCHEDULE = Cubic("4st", "14st", every="5st")

PARTS: dict[str, Callable[[], PruningCallback] | None] = {
    "no pruning": None,
    "taylor": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE),
    "epochs": lambda: PruningCallback(
        0.8, criterion=Gradient(), selector=PerLayer(), schedule=Cubic("1ep", "3ep")
    ),
    "targets": lambda: PruningCallback(
        {"net.0*": 0.5, "*": 0.8}, criterion=Taylor(), selector=Global(budget="macs"), schedule=SCHEDULE
    ),
    "pattern": lambda: PruningCallback(criterion=Wanda(every=3), selector=NofM(2, 4), schedule=SCHEDULE),
    "channels": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), selector=Global(budget="macs"), schedule=SCHEDULE
    ),
    "activations": lambda: PruningCallback(
        0.4, criterion=ActivationTaylor(every=2), structure=Channels(), schedule=SCHEDULE
    ),
    "losses": lambda: PruningCallback(
        0.4, criterion=OptimalBrainDamage(batches=2), structure=Channels(), schedule=SCHEDULE
    ),
    "search": lambda: PruningCallback(
        0.4,
        structure=Channels(),
        selector=ParticleFilter(population=4, rounds=2, batches=2),
        schedule=OneShot("7st"),
    ),
    "rewind": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE, rewind=Rewind("2st")),
    "learning rate": lambda: PruningCallback(0.8, schedule=SCHEDULE, rewind=Rewind("2st", weights=False)),
    "guard": lambda: PruningCallback(
        0.9,
        criterion=Taylor(),
        schedule=Steps({"1ep": 0.5, "2ep": 0.9, "3ep": 1.0}),
        guard=Guard("acc", max_drop=0.05, patience=1),
    ),
    "reconstruction": lambda: PruningCallback(
        0.8, criterion=Taylor(), schedule=SCHEDULE, reconstruct=Reconstruct(batches=5)
    ),
    "sparsegpt": lambda: PruningCallback(
        criterion=OptimalBrainSurgeon(),
        selector=NofM(2, 4),
        schedule=SCHEDULE,
        reconstruct=Reconstruct(batches=5),
    ),
    "compacted": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), schedule=SCHEDULE, compact=True
    ),
    "cut": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), schedule=SCHEDULE, compact="each"
    ),
    "cut by activations": lambda: PruningCallback(
        {"net.0*": 0.5, "net.4*": 0.6},
        criterion=ActivationTaylor(every=2),
        structure=Channels(),
        selector=Global(budget="macs"),
        schedule=SCHEDULE,
        compact="each",
    ),
    "cut by losses": lambda: PruningCallback(
        0.4,
        criterion=OptimalBrainDamage(batches=2),
        structure=Channels(),
        schedule=SCHEDULE,
        reconstruct=Reconstruct(batches=5),
        compact="each",
    ),
}


class Noisy(Lit):
    """Draws numbers in each step, and has all sorts of state."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: Adam(parameters, 0.01))
        self.register_buffer("validations", torch.zeros((), dtype=torch.int64))

    def on_validation_end(self) -> None:
        self.validations += 1

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.dropout(images, 0.1, self.training))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = {"scheduler": CosineAnnealingLR(optimizer, 40), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def run(name: str, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Trains to the end.

    Returns:
        All that the fit leaves: weights, masks, state of optimizer and callback, report, random state.
    """
    make = PARTS[name]
    pruning = None if make is None else make()
    model = seeded(Noisy)
    fit = trainer(
        folder,
        *([] if pruning is None else [pruning]),
        RandomState(),
        *callbacks,
        max_epochs=EPOCHS,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )
    loader = ResumableLoader(digits().dataset, 64)
    fit.fit(model, loader, digits(examples=100), ckpt_path=ckpt_path)
    left = {
        "weights": model.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "schedule": fit.lr_scheduler_configs[0].scheduler.state_dict(),
    }
    if pruning is not None:
        state = pruning.state_dict()
        left |= {"masks": dict(pruning.masks), "state": _timeless(state)}
        left["report"] = _timeless(json.loads(pruning.report.to_json()))
    return left


class EveryStep(ModelCheckpoint):
    """A checkpoint of each training step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


class EveryEpoch(ModelCheckpoint):
    """A checkpoint of each epoch, after its validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="end-{step}", save_top_k=-1, every_n_epochs=1)


def resumable(folder: Path) -> list[Path]:
    """The checkpoints that Lightning resumes exactly, the latest last.

    From one of an epoch's last step it goes on with the next epoch, and leaves a validation out.
    """
    lacking = {f"step={BATCHES * epoch}" for epoch in range(EPOCHS + 1)}
    found = [path for path in folder.glob("*.ckpt") if path.stem not in lacking]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _timeless(tree: Any) -> Any:
    """Without what a clock has measured, and the proof: it is of the first batch after a resume."""
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in ("latency", "proof")}
    return [_timeless(each) for each in tree] if isinstance(tree, list) else tree
