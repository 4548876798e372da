"""Probes of a module in a fit: ``forward``, ``training_step`` and ``validation_step`` on a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_prune.core.probes import ForwardProbe, Probe
from lightning_prune.core.tensors import map_tensors
from lightning_prune.training.stub_trainer import use_stubs_


class ForwardInFitProbe(ForwardProbe):
    """Calls ``forward`` on a copy of a module in a fit; ``forward`` may read from the Trainer.

    Args:
        trainer: The module's Trainer, which does not change.
        example: As for :class:`ForwardProbe`.
        keywords: As for :class:`ForwardProbe`.
    """

    def __init__(self, trainer: Trainer, example: Any, keywords: Mapping[str, Any] | None = None) -> None:
        super().__init__(example, keywords)
        self._trainer = trainer

    def __call__(self, model: nn.Module) -> Any:
        """Return the outputs of ``forward``."""
        use_stubs_(model, self._trainer)
        return super().__call__(model)


class _BackwardError(Exception):
    """A step that is to end at its first ``manual_backward`` has called it."""


class StepProbe(Probe):
    """Runs ``training_step`` or ``validation_step`` of a copy of a module on one batch.

    Random state, metrics, logs and optimizers of the fit stay as they are. ``manual_backward`` and steps of
    optimizers do nothing.

    Args:
        trainer: The module's Trainer, which does not change.
        batch: A batch, as the step gets it.
        name: ``"training_step"`` or ``"validation_step"``.
        number: Number of the batch.
        to_backward: Whether to stop at the first ``manual_backward``.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch: Any,
        name: str = "training_step",
        *,
        number: int = 0,
        to_backward: bool = False,
    ) -> None:
        self.training = name == "training_step"
        self._trainer, self._batch = trainer, batch
        self._name, self._number, self._to_backward = name, number, to_backward

    def __call__(self, model: nn.Module) -> tuple[Any, list[Any], list[Any]]:
        """Return the step's result, the losses given to ``manual_backward``, and the logged values."""
        losses: list[Any] = []
        logged: list[Any] = []

        def add_loss(loss: Any) -> None:
            losses.append(loss)
            if self._to_backward:
                raise _BackwardError

        use_stubs_(model, self._trainer, add_loss, logged.append)
        step = getattr(model, self._name)
        # by position, as Lightning passes them: arguments after the batch may have any name
        given = [
            value
            for count, (name, value) in enumerate((("batch_idx", self._number), ("dataloader_idx", 0)), 2)
            if is_param_in_hook_signature(step, name, min_args=count)
        ]
        result: Any = None
        failure: Exception | None = None
        batch = map_tensors(self._batch, torch.clone)
        with isolate_rng(), _dtype_of(model):  # isolate_rng restores nothing after an exception
            try:
                result = step(batch, *given)
            except _BackwardError:
                pass
            except Exception as error:  # a user's step may raise anything
                failure = error
        if failure is not None:
            raise failure
        return result, losses, logged

    def with_number(self, number: int) -> StepProbe:
        """Return a probe of the same step with another number of the batch."""
        probe = copy.copy(self)
        probe._number = number
        return probe

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> StepProbe:
        """Return a probe with a function applied to each tensor of the batch."""
        probe = copy.copy(self)
        probe._batch = map_tensors(self._batch, change)
        return probe


@contextmanager
def _dtype_of(model: nn.Module) -> Iterator[None]:
    """Set the default dtype to that of the weights, as Lightning's true-precision plugins do in a fit."""
    before = torch.get_default_dtype()
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), before)
    try:
        if before == torch.float32:  # any other default was chosen by the user
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)
