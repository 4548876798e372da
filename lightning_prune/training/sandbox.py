"""Runs ``training_step`` or ``forward`` outside the fit loop, on copies, without a change to the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import ForwardProbe, Probe, cast_or_move, evaluation_mode, to_model
from lightning_prune.statistics.losses import LossFunction
from lightning_prune.training.hooks import ExampleCapture
from lightning_prune.training.stub_trainer import BackwardError, use_stubs_

_EXAMPLES = 2  # taken of a batch: with one alone, a squeeze would drop the batch dimension


class NoLossError(ValueError):
    """``training_step`` returned no loss for a batch."""


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


class TrainingStepProbe(Probe):
    """Runs ``training_step`` of a copy of a module on one batch, up to the first ``manual_backward``.

    Random state, metrics, logs and optimizers of the fit stay as they are.

    Args:
        trainer: The module's Trainer, which does not change.
        batch: A training batch, as ``training_step`` gets it.
    """

    def __init__(self, trainer: Trainer, batch: Any) -> None:
        self._trainer = trainer
        self._batch = batch

    def __call__(self, model: nn.Module) -> Any:
        """Return what ``training_step`` returns, or the loss given to its first ``manual_backward``."""
        assert isinstance(model, LightningModule)
        use_stubs_(model, self._trainer)
        # by position, as Lightning passes it: a second argument may have any name
        given = (0,) if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2) else ()
        result: Any = None
        failure: Exception | None = None
        batch = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, self._batch)
        with isolate_rng(), _dtype_of(model):  # isolate_rng restores nothing after an exception
            try:
                result = model.training_step(batch, *given)
            except BackwardError as stop:
                result = stop.loss
            except Exception as error:  # a user's training_step may raise anything
                failure = error
        if failure is not None:
            raise failure
        return result

    def to(self, target: torch.dtype | torch.device) -> TrainingStepProbe:
        """Return a probe of the same batch, in another type or on another device."""
        return TrainingStepProbe(self._trainer, cast_or_move(self._batch, target))


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


def find_probe(trainer: Trainer, module: LightningModule, batch: Any) -> Probe:
    """Return a probe of a module: a pass of ``forward`` on an example input, and one of ``training_step``.

    The example is the module's ``example_input_array`` or, if it has none, the arguments that ``training_step``
    calls ``forward`` with. Without an example ``training_step`` is run alone. If it fails outside the loop,
    ``forward`` is run alone on the module's example.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it. The probe keeps its first two examples, or all of
            it if the step fails on two.

    Raises:
        ValueError: If ``training_step`` fails and the module has no example, or ``forward`` fails on the
            module's example.
    """
    example = module.example_input_array
    for examples in (tree_map(_first_examples, batch), batch):
        step = TrainingStepProbe(trainer, examples)
        forward, failure = _forward_in(step, trainer, module)
        if failure is None:
            if example is not None:
                forward = _example_probe(trainer, module, example)
            return step if forward is None else forward.with_further_passes(step)
    if example is None:
        raise ValueError(
            f"{type(module).__name__}.training_step does not run outside the loop ({failure!r}): give the"
            " module an example_input_array."
        )
    rank_zero_info(f"training_step is not looked at, it fails outside the loop with {failure!r}.")
    return _example_probe(trainer, module, example)


def training_loss(trainer: Trainer) -> LossFunction:
    """Return a function that computes the loss of ``training_step`` for a copy of a module and a batch.

    The function raises NoLossError if ``training_step`` returns no loss.

    Args:
        trainer: The module's Trainer, which does not change.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result = TrainingStepProbe(trainer, batch)(model)
        found = result.get("loss") if isinstance(result, Mapping) else result
        if not torch.is_tensor(found):
            raise NoLossError(f"training_step gives {found!r} for a held batch, and no loss.")
        return found

    return loss


def forward_probe(trainer: Trainer, module: LightningModule, batch: Any) -> ForwardProbe:
    """Return a probe of ``forward`` with the arguments that ``training_step`` calls it with.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it.

    Raises:
        ValueError: If ``training_step`` fails before it calls ``forward``, or never calls it.
    """
    forward, failure = _forward_in(TrainingStepProbe(trainer, batch), trainer, module)
    if forward is None:  # a step that fails after it has called forward is no problem
        why = "it does not call forward" if failure is None else repr(failure)
        raise ValueError(
            f"{type(module).__name__}.training_step does not show what forward is called with ({why}): give the"
            " module an example_input_array."
        )
    return forward


def capture_example(trainer: Trainer, module: LightningModule, batch: Any) -> ExampleCapture:
    """Run ``training_step`` on a copy of a module, and return the capture of the input of ``forward``.

    The capture is empty if the step does not call ``forward``, or fails before.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it.
    """
    twin = copy_model(module)
    capture = ExampleCapture(twin)
    failure = failure_of(TrainingStepProbe(trainer, batch), twin)
    if failure is not None:
        rank_zero_info(f"training_step fails outside the loop with {failure!r}.")
    capture.release()
    return capture


def failure_of(run: Callable[[LightningModule], object], twin: LightningModule) -> Exception | None:
    """Run a copy of a module in evaluation mode, and return the exception if that fails.

    Args:
        run: Runs ``forward`` or ``training_step`` of the copy.
        twin: The copy, as ``copy_model`` returns it.
    """
    try:
        with evaluation_mode(twin):
            run(twin)
    except Exception as error:  # a user's code may raise anything
        return error
    return None


def _forward_in(
    step: TrainingStepProbe, trainer: Trainer, module: LightningModule
) -> tuple[ForwardProbe | None, Exception | None]:
    """Run ``training_step`` on a copy of a module.

    Returns:
        A probe of its first call of ``forward``, if there was one, and the exception if the step failed.
    """
    twin = copy_model(module)
    calls: list[ForwardProbe] = []

    def keep_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(ForwardInFitProbe(trainer, args, kwargs))

    twin.register_forward_pre_hook(keep_first, with_kwargs=True)
    failure = failure_of(step, twin)
    return (calls[0] if calls else None), failure


def _example_probe(trainer: Trainer, module: LightningModule, example: Any) -> ForwardProbe:
    """Return a probe of ``forward`` on the module's ``example_input_array``, after a trial on a copy.

    Raises:
        ValueError: If ``forward`` fails.
    """
    probe = ForwardInFitProbe(trainer, to_model(example, module))
    failure = failure_of(probe, copy_model(module))
    if failure is not None:
        raise ValueError(
            f"{type(module).__name__} cannot run on its example_input_array ({failure!r}): give it one that"
            " forward takes, or none, and an example of a training batch is taken."
        ) from failure
    return probe


def _first_examples(value: Any) -> Any:
    return value[:_EXAMPLES] if torch.is_tensor(value) and value.ndim else value
