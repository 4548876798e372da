"""Batches of a Trainer's data, as its steps would get them, taken without a change to a fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, product
from typing import Any

from torch.utils._pytree import tree_leaves

from lightning_prune.core.tensors import cast_or_move
from lightning_prune.training.lightning_packages import (
    CombinedLoader,
    LightningDataModule,
    LightningModule,
    Trainer,
    isolate_rng,
    overrides,
)


def training_batch(trainer: Trainer, module: LightningModule) -> Any:
    """Return a batch of the present fit, as ``training_step`` would get it; ``None`` if there is no data.

    The random state and the positions of stateful loaders do not change.
    """
    if trainer.train_dataloader is None:
        return None
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    stateful = [each for each in loaders.flattened if hasattr(each, "state_dict")]
    places = [each.state_dict() for each in stateful]
    with isolate_rng():  # loaders draw a random order
        batch, *_ = next(iter(loaders), (None,))
    for each, place in zip(stateful, places, strict=True):
        each.load_state_dict(place)
    if batch is None:
        return None
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    # when a fit has ended, a strategy may have brought the module back to the CPU
    return trainer.strategy.batch_to_device(batch, module.device)


def first_batch(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None = None) -> Any:
    """Return the first batch that ``validation_step`` or, without validation data, ``training_step`` would get.

    Args:
        trainer: The Trainer; it is attached to the model and the data module.
        model: The model, for its own loaders and batch transfer hooks.
        datamodule: The data module; its loaders and hooks take precedence over those of the model.

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there is no batch.
    """
    owners = _set_up(trainer, model, datamodule)
    for name, owner in product(("val_dataloader", "train_dataloader"), owners):
        if overrides(owner, name):
            # there may be several loaders, in lists or dicts
            for batch in chain.from_iterable(tree_leaves(getattr(owner, name)())):
                return _transferred(batch, owners)
    raise _no_batch(owners)


def training_batches(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, count: int
) -> list[Any]:
    """Return the first batches that ``training_step`` would get in a fit, on the Trainer's device.

    Args:
        trainer: The Trainer; it is attached to the model and the data module.
        model: The model, for its own loaders and batch transfer hooks.
        datamodule: The data module; its loaders and hooks take precedence over those of the model.
        count: How many; there may be fewer in the data.

    Raises:
        ValueError: If there is no batch.
    """
    owners = _set_up(trainer, model, datamodule)
    owner = next((each for each in owners if overrides(each, "train_dataloader")), None)
    loaders = [] if owner is None else CombinedLoader(owner.train_dataloader(), "max_size_cycle")
    found = [batch for batch, *_ in islice(iter(loaders), count)]
    if not found:
        raise _no_batch(owners)
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device
    return [cast_or_move(_transferred(plugin.convert_input(each), owners), device) for each in found]


def _set_up(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None
) -> list[LightningModule | LightningDataModule]:
    """Attach the Trainer to what has data, let that prepare it, and return it: the data module first."""
    owners = [owner for owner in (datamodule, model) if owner is not None]
    for owner in owners:
        owner.trainer = trainer
        owner.prepare_data()
        owner.setup("fit")
    return owners


def _no_batch(owners: Sequence[object]) -> ValueError:
    return ValueError(f"{' and '.join(type(owner).__name__ for owner in owners)}: there is no batch of data.")


def _transferred(batch: Any, owners: Sequence[LightningModule | LightningDataModule]) -> Any:
    """Return a batch after the transfer hooks; each is taken from the first owner that overrides it."""
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        owner = next((owner for owner in owners if overrides(owner, name)), owners[0])
        batch = getattr(owner, name)(batch, 0)
    return batch
