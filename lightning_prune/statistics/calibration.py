"""Calibration: passes of a network on a few batches, for what needs the inputs of its layers at an event."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core.probes import Probe, as_probe


@dataclass(frozen=True, eq=False)
class Calibration:
    """Passes of a network on calibration batches; neither labels nor gradients are needed.

    Args:
        passes: Runs the network on a batch, one for each batch of this process.
        add_up: Returns the sum of a tensor over all processes, where there are several.
        first: Whether this process is the first one, whose numbers count where rounding differs.
        warn: Called with a warning.
    """

    passes: Sequence[Probe]
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor
    first: bool = True
    warn: Callable[[str], object] = warnings.warn

    @classmethod
    def of(cls, batches: Calibration | Iterable[Any]) -> Calibration:
        """Return a calibration as it is, or the one of a user's batches.

        Args:
            batches: What ``forward`` is given for each batch: a tensor, a tuple of its arguments or a mapping
                of keyword arguments.

        Raises:
            ValueError: If it is no iterable of these.
        """
        if isinstance(batches, Calibration):
            return batches
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise ValueError(f"batches={kind} must be a list: what forward is given for each batch.")
        given = list(batches)
        if any(isinstance(each, list) for each in given):
            raise ValueError("batches: what forward is given is a tensor, a tuple or a mapping, and no list.")
        return cls([as_probe(each) for each in given])

    def anywhere(self, here: bool, device: torch.device) -> bool:
        """Return whether something holds in any process.

        Args:
            here: Whether it holds in this one.
            device: A device on which processes exchange tensors.
        """
        return bool(self.add_up(torch.tensor(float(here), device=device)))

    def agreed(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the first process."""
        return self.add_up(tensor if self.first else torch.zeros_like(tensor))
