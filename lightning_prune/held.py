"""Training batches held for what asks for the loss."""

from __future__ import annotations

from typing import Any

import torch


class HeldBatches:
    """Copies of batches, on the CPU.

    Args:
        count: How many are wanted.

    Attributes:
        batches: Those that are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.batches: list[Any] = []

    @property
    def full(self) -> bool:
        """Whether there are as many as wanted."""
        return len(self.batches) >= self._count

    def hold(self, batch: Any) -> None:
        """Holds a copy of one more.

        Raises:
            ValueError: If a checkpoint could not hold it.
        """
        self.batches.append(_copied(batch))


def _copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"a training batch holds a {type(value).__name__}, but checkpoints take tensors and plain values in"
        " lists, tuples and dicts: make these in the collate function, or take parts that ask for no loss."
    )
