"""What Lightning leaves out of a checkpoint: where the loader was, and the random state.

With both, a fit that is stopped anywhere and resumed is bit for bit the fit that was not stopped. For several
processes, or workers that draw numbers, there is ``torchdata.stateful_dataloader.StatefulDataLoader``.
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
    """An order for each epoch, that depends on its number and a seed alone.

    Args:
        size: How many examples there are.
        seed: Of all orders.

    Attributes:
        first: Examples to leave out, once.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._size, generator=draw).tolist()
        first, self.first = self.first, 0
        yield from order[first:]


class ResumableLoader(DataLoader[Any]):
    """A shuffling loader that goes on with the batch at which a fit was stopped.

    Args:
        dataset: The examples.
        batch_size: How many are a batch.
        seed: Of their order.
        **options: Of ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int = 1, seed: int = 0, **options: Any) -> None:
        self._order = Shuffled(len(dataset), seed)  # type: ignore[arg-type]
        self._done = 0
        own = torch.Generator().manual_seed(seed)  # an iterator draws a number, of all processes' otherwise
        super().__init__(dataset, batch_size, sampler=self._order, generator=own, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._done = self._order.first // (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch are done."""
        return {"done": self._done % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on there."""
        self._done = state["done"]
        self._order.first = state["done"] * (self.batch_size or 1)


class RandomState(Callback):
    """Saves the state of all generators in a checkpoint, and restores it."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; those loaded, where a fit had nothing left to do."""
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
        """Keeps it until loaders, which draw numbers too, are there."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what was loaded."""
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
