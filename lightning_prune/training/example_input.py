"""The example input of a module, taken from the first batch of a fit: for ``forward``, and to trace it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.core.model_copies import is_compiled
from lightning_prune.core.probes import Probe, own_example
from lightning_prune.core.tensors import to_model
from lightning_prune.report.cost import Workload
from lightning_prune.training.hooks import ForwardCapture, first_of
from lightning_prune.training.lightning_packages import LightningModule, Trainer
from lightning_prune.training.sandbox import capture_example, find_probe


class ExampleInput:
    """The example input of one fit, taken from its first batch.

    Attributes:
        probe: Runs the module on the first batch, to trace it; ``None`` before :meth:`find_probe`.
    """

    def __init__(self) -> None:
        self.probe: Probe | None = None
        self._capture: ForwardCapture | None = None
        self._loaded: int | None = None  # the size of the first batch

    @property
    def forward_captured(self) -> bool:
        """Whether an input of ``forward`` was captured, or will be in the next forward pass."""
        return self._capture is not None

    def find_probe(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        validation_batches: Mapping[int, Any] | None = None,
    ) -> None:
        """Set ``probe``, unless it is set.

        Args:
            trainer: The Trainer of the fit.
            module: The module; it does not change.
            batch: A training batch, as ``training_step`` gets it.
            validation_batches: Number of a validation loader to a batch of it, as far as they were seen.

        Raises:
            ValueError: If the module cannot be run outside the fit loop.
        """
        if self.probe is None:
            self.probe = find_probe(trainer, module, batch, validation_batches)

    def capture_forward(
        self, trainer: Trainer, module: LightningModule, batch: Any, *, on_copy: bool = False
    ) -> None:
        """Capture the input of ``forward`` in the next forward pass, unless one was captured.

        Args:
            trainer: The Trainer of the fit.
            module: The module; it has another ``forward`` until its next forward pass.
            batch: A training batch, as ``training_step`` gets it.
            on_copy: Whether to run a copy of the module on the batch instead, because no forward pass follows.
                A compiled module is always copied: it would be compiled again.
        """
        if self._capture is None:
            leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
            self._loaded = next((len(leaf) for leaf in leaves), None)
            on_copy = on_copy or is_compiled(module)
            if on_copy:
                self._capture = capture_example(trainer, module, batch)
            else:
                self._capture = ForwardCapture(module, first_of)

    def example(self, model: nn.Module) -> Any:
        """Return an input of ``forward``, on the model's device and of its type; ``None`` if there is none.

        The model's ``example_input_array`` takes precedence over the captured input.
        """
        example = own_example(model)
        if example is None and self._capture is not None:
            example = self._capture.example
        return None if example is None else to_model(example, model)  # the device may change in a fit

    def workload(self, model: nn.Module, seconds: float = 0.0, device: torch.device | None = None) -> Workload:
        """Return what to measure the model on: no more than a batch of the fit.

        Args:
            model: The model.
            seconds: Time limit for all measurements of latency together; 0 to measure none.
            device: The device to run the model on; ``None`` for the one that it is on.
        """
        captured = self._capture is not None and self._capture.arguments is not None
        largest = self._capture.batch_size if self._capture is not None and captured else self._loaded
        return Workload(self.example(model), largest, seconds, device)

    def release(self) -> None:
        """Restore ``forward`` and drop the probe; the captured input stays."""
        self.probe = None
        if self._capture is not None:
            self._capture.release()
