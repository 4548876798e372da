"""Resuming within an epoch: a data loader that saves its position, and a callback that saves the random state.

Lightning's own checkpoints contain neither. With both, a fit that is stopped at any step and resumed equals the
uninterrupted fit bit for bit. With several processes, or with workers that draw random numbers, use
``torchdata.stateful_dataloader.StatefulDataLoader`` instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler


class Shuffled(Sampler[int]):
    """Samples each epoch in a random order that depends on the number of the epoch and a seed alone.

    Args:
        size: Number of examples.
        seed: Seed of the orders; the number of the epoch is added to it.

    Attributes:
        first: Number of examples that the next iteration skips; the iteration resets it to 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch; Lightning calls this method before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._size, generator=draw).tolist()
        first, self.first = self.first, 0
        yield from order[first:]


class ResumableLoader(DataLoader[Any]):
    """A shuffling data loader that continues a resumed fit with the next batch of the interrupted epoch.

    Args:
        dataset: The examples.
        batch_size: Number of examples in a batch.
        seed: Seed of the random order.
        **options: Further arguments of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int = 1, seed: int = 0, **options: Any) -> None:
        self._order = Shuffled(len(dataset), seed)  # type: ignore[arg-type]
        self._done = 0
        # each iterator draws a seed for its workers; without this generator, from the global random state
        own = torch.Generator().manual_seed(seed)
        super().__init__(dataset, batch_size, sampler=self._order, generator=own, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._done = self._order.first // (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches of the current epoch that are done; 0 at the end of an epoch."""
        return {"done": self._done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start after the batches that were done."""
        self._done = state["done"]
        self._order.first = state["done"] * (self.batch_size or 1)


class RandomState(Callback):
    """Saves the state of the global random number generators in a checkpoint, and restores it.

    It covers Python, NumPy and PyTorch, on the CPU and on all CUDA devices.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generators as tensors and plain values.

        A state that was loaded but not restored, because the fit had no steps left, is returned as it is.
        """
        if self._state is not None:
            return self._state
        numpy = np.random.get_state(legacy=False)
        return {
            "python": random.getstate(),
            "numpy": numpy | {"state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, since setting up the data loaders draws random numbers, too."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state that was loaded, if there is one.

        Raises:
            ValueError: If a state was loaded and there are several processes.
        """
        if self._state is None:
            return
        if trainer.world_size > 1:
            raise ValueError("RandomState is for one process: a checkpoint holds the state of the first alone.")
        random.setstate(self._state["python"])
        np.random.set_state(self._state["numpy"])
        torch.set_rng_state(self._state["torch"].cpu())
        for device, each in enumerate(self._state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each.cpu(), device)
        self._state = None
