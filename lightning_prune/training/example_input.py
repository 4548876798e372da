"""What a fit's first batch tells of its module: how to run it, and what its ``forward`` is given."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_prune.core.model_copies import is_compiled
from lightning_prune.core.probes import Probe, to_model
from lightning_prune.training.hooks import ExampleCapture
from lightning_prune.training.sandbox import capture_example, find_probe


class ExampleInput:
    """Looks at a first batch, and keeps what it tells.

    Attributes:
        probe: Runs the module; ``None`` unless it was asked for.
    """

    def __init__(self) -> None:
        self.probe: Probe | None = None
        self._capture: ExampleCapture | None = None

    @property
    def forward_captured(self) -> bool:
        """Whether ``forward`` was looked at, or will be in the pass to come."""
        return self._capture is not None

    def find_probe(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Tells how the module is run, unless it is known.

        Raises:
            ValueError: If it cannot be told.
        """
        if self.probe is None:
            self.probe = find_probe(trainer, module, batch)

    def capture_forward(
        self, trainer: Trainer, module: LightningModule, batch: Any, *, aside: bool = False
    ) -> None:
        """Looks at what ``forward`` is given, unless it was looked at.

        Args:
            trainer: In a fit.
            module: Of that fit.
            batch: As ``training_step`` gets it.
            aside: Whether to look at a pass of a copy, as none of the module is to come. With a compiled module
                it is one of a copy anyhow: a hook would have it compiled again.
        """
        if self._capture is None:
            aside = aside or is_compiled(module)
            self._capture = capture_example(trainer, module, batch) if aside else ExampleCapture(module)

    def example(self, model: nn.Module) -> Any:
        """An example for ``forward``, the module's own before one that was seen; ``None`` if there is none."""
        example = getattr(model, "example_input_array", None)
        if example is None and self._capture is not None:
            example = self._capture.example
        return None if example is None else to_model(example, model)  # which moves in the course of a fit

    def release(self) -> None:
        """Takes the hook away and lets go of the probe; what ``forward`` was given stays known."""
        self.probe = None
        if self._capture is not None:
            self._capture.release()
