"""Probes of a module in a fit: ``forward``, ``training_step`` and ``validation_step`` on a copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.core.probes import ForwardProbe, Probe
from lightning_prune.core.tensors import map_tensors
from lightning_prune.training.lightning_packages import Trainer, is_param_in_hook_signature, isolate_rng
from lightning_prune.training.stub_trainer import Position, use_stubs_
from lightning_prune.training.trainer_queries import fit_length

_ENDLESS = 10_000  # epochs, steps or batches of a fit that has no limit


class ForwardInFitProbe(ForwardProbe):
    """Calls ``forward`` on a copy of a module in a fit; ``forward`` may read from the Trainer.

    Each call finds the Trainer at the position at which the probe was made.

    Args:
        trainer: The module's Trainer, which does not change.
        example: As for :class:`ForwardProbe`.
        keywords: As for :class:`ForwardProbe`.
    """

    def __init__(self, trainer: Trainer, example: Any, keywords: Mapping[str, Any] | None = None) -> None:
        super().__init__(example, keywords)
        self._trainer, self._position = trainer, Position(trainer.current_epoch, trainer.global_step)

    def __call__(self, model: nn.Module) -> Any:
        """Return the outputs of ``forward``."""
        use_stubs_(model, self._trainer, self._position)
        return super().__call__(model)


class _BackwardError(Exception):
    """A step that is to end at its first backward pass has come to it."""


class _BackwardMode(TorchFunctionMode):
    """Calls a function instead of ``loss.backward()``, which some steps call past ``manual_backward``."""

    def __init__(self, on_backward: Callable[[Any], object]) -> None:
        super().__init__()
        self._on_backward = on_backward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            self._on_backward(args[0])
            return None
        return func(*args, **(kwargs or {}))


class StepProbe(Probe):
    """Runs ``training_step`` or ``validation_step`` of a copy of a module on one batch.

    Random state, metrics, logs and optimizers of the fit stay as they are. Backward passes and steps of
    optimizers do nothing. Each call finds the Trainer at one position: that at which the probe was made.

    Args:
        trainer: The module's Trainer, which does not change.
        batch: A batch, as the step gets it.
        name: ``"training_step"`` or ``"validation_step"``.
        loader: Number of the validation loader.
        to_backward: Whether to stop at the first backward pass under manual optimization.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch: Any,
        name: str = "training_step",
        *,
        loader: int = 0,
        to_backward: bool = False,
    ) -> None:
        self.training = name == "training_step"
        self._trainer, self._batch = trainer, batch
        self._name, self._number, self._loader, self._to_backward = name, 0, loader, to_backward
        self._position = Position(trainer.current_epoch, trainer.global_step)

    def __call__(self, model: nn.Module) -> tuple[Any, list[Any], list[Any]]:
        """Return the step's result, the losses of its backward passes, and the logged values."""
        losses: list[Any] = []
        logged: list[Any] = []

        def add_loss(loss: Any) -> None:
            losses.append(loss)
            if self._to_backward:
                raise _BackwardError

        use_stubs_(model, self._trainer, self._position, add_loss, logged.append)
        step = getattr(model, self._name)
        # by position, as Lightning passes them: arguments after the batch may have any name
        given = [
            value
            for count, (name, value) in enumerate(
                (("batch_idx", self._number), ("dataloader_idx", self._loader)), 2
            )
            if is_param_in_hook_signature(step, name, min_args=count)
        ]
        result: Any = None
        failure: Exception | None = None
        batch = map_tensors(self._batch, torch.clone)
        # a mode would keep attention in evaluation mode from its fast path
        mode = _BackwardMode(add_loss) if self.training else nullcontext()
        with isolate_rng(), _dtype_of(model), mode:  # isolate_rng restores nothing after an exception
            try:
                result = step(batch, *given)
            except _BackwardError:
                pass
            except Exception as error:  # a user's step may raise anything
                failure = error
        if failure is not None:
            raise failure
        return result, losses, logged

    def at(self, position: Position, number: int) -> StepProbe:
        """Return a probe of the same step at another position of the fit, with another number of the batch."""
        probe = copy.copy(self)
        probe._position, probe._number = position, number
        return probe

    @property
    def elsewhere(self) -> tuple[StepProbe, StepProbe]:
        """Probes of the same step for the second batch, and for the last one of the last epoch."""
        return self.at(self._position, 1), self.at(*_last(self._trainer))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> StepProbe:
        """Return a probe with a function applied to each tensor of the batch."""
        probe = copy.copy(self)
        probe._batch = map_tensors(self._batch, change)
        return probe


def _last(trainer: Trainer) -> tuple[Position, int]:
    """Return the last position of a fit, and the number of its batch; large numbers where it has no end."""
    length = fit_length(trainer)
    batches = trainer.num_training_batches
    step = _ENDLESS if length.length is None else max(length.length * max(1, len(trainer.optimizers)) - 1, 0)
    epoch = _ENDLESS if length.epochs is None else length.epochs - 1
    return Position(epoch, step), _ENDLESS if math.isinf(batches) else int(batches) - 1


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
