"""What a Trainer says about its fit, in this library's terms."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.moments import Horizon
from lightning_prune.report import Report

_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def horizon(trainer: Trainer) -> Horizon:
    """How long the fit is."""
    batches = trainer.num_training_batches
    optimizers = max(1, len(trainer.optimizers))
    return Horizon(
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        # max_steps counts the steps of every optimizer
        steps=None if trainer.max_steps == -1 else -(-trainer.max_steps // optimizers),
        steps_per_epoch=None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches),
    )


def loss_scale(trainer: Trainer) -> float:
    """What the loss, and so its gradients, are multiplied with at present."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def monitored(trainer: Trainer) -> str | None:
    """The metric that the run is judged by, if a callback watches one."""
    watching = (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks)
    names = (getattr(callback, "monitor", None) for callback in watching)
    return next((name for name in names if name), None)


def check_whole(trainer: Trainer) -> None:
    """Raises ValueError if each process holds a part of the model only: channels run over several parts."""
    if isinstance(trainer.strategy, _SHARDING):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} splits the model up: channels, and compact=True, need"
            " it whole, as with DDP or a single device."
        )


def write_report(trainer: Trainer, report: Report, folder: Path, name: str | None) -> None:
    """Prints a report, and writes it beside the logger's files."""
    if not trainer.is_global_zero:
        return
    print(report.table())
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = "report" if name is None else f"report-{name}"
    (folder / f"{stem}.json").write_text(report.to_json())
    try:
        report.plot(folder / f"{stem}.png")
    except ImportError:
        rank_zero_info("matplotlib is not installed, so there is no plot of the report.")
    rank_zero_info(f"Pruning report written to {folder / stem}.json.")
