"""A Trainer with one PruningCallback, as functions take that call it themselves."""

from __future__ import annotations

from lightning_prune.callbacks.pruning import PruningCallback, pruning_callbacks
from lightning_prune.training.lightning_packages import (
    LightningDataModule,
    LightningModule,
    Trainer,
    is_lightning_module,
    overrides,
)


def only_callback(trainer: Trainer, model: LightningModule, who: str) -> PruningCallback:
    """Return the Trainer's PruningCallback.

    Args:
        trainer: The Trainer.
        model: The module that it will run.
        who: The function that needs it, for the error message.

    Raises:
        ValueError: If there is not one, or the model is no LightningModule or compacted already, or there are
            several processes.
    """
    if not is_lightning_module(model):
        raise ValueError(f"model={type(model).__name__} must be a LightningModule.")
    found = pruning_callbacks(trainer)
    if len(found) != 1:
        raise ValueError(f"{who} needs a Trainer with one PruningCallback, and this one has {len(found)}.")
    if trainer.world_size > 1:
        raise ValueError(f"{who} works in one process, and the Trainer has {trainer.world_size}: devices=1.")
    network = found[0]._state.network
    if network.model is model and network.plan is not None:
        raise ValueError(f"the callback has compacted this network already: {who} takes one that is not.")
    return found[0]


def validated(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None
) -> dict[str, float]:
    """Return the validation metrics; none without validation data."""
    owners = [each for each in (datamodule, model) if each is not None]
    if not overrides(model, "validation_step") or not any(overrides(each, "val_dataloader") for each in owners):
        return {}
    results = trainer.validate(model, datamodule, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}
