"""What a Trainer says about its fit, in this library's terms."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from lightning_prune.moments import Horizon


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
