"""Runs ``training_step`` or ``forward`` outside the fit loop, on copies, without a change to the fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.outermost_calls import outermost_calls
from lightning_prune.core.probes import ForwardProbe, Probe, own_example, pass_mode
from lightning_prune.core.tensors import map_tensors, to_model
from lightning_prune.statistics.losses import LossFunction
from lightning_prune.training.fit_probes import ForwardInFitProbe, StepProbe
from lightning_prune.training.hooks import ForwardCapture, first_of
from lightning_prune.training.lightning_packages import LightningModule, Trainer, overrides, rank_zero_info

_EXAMPLES = 2  # taken of a batch: with one alone, a squeeze would drop the batch dimension


class NoLossError(ValueError):
    """``training_step`` returned no loss for a batch."""


def find_probe(
    trainer: Trainer, module: LightningModule, batch: Any, validation_batches: Mapping[int, Any] | None = None
) -> Probe:
    """Return a probe of a module with the passes that a fit makes.

    The first pass is one of ``forward`` in evaluation mode, on the module's ``example_input_array`` or, if it
    has none, on the arguments that ``training_step`` calls ``forward`` with. Further passes are
    ``training_step``, as for the first and the second batch, and for the last one of the last epoch, and
    ``validation_step`` for each loader, as far as they run outside the loop. If no call of ``forward`` runs,
    ``training_step`` is the first pass.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it. The probe keeps its first two examples, or all of
            it if the step fails on two.
        validation_batches: Number of a validation loader to a batch of it, as ``validation_step`` gets it;
            without one, ``batch`` is taken as one of the first loader.

    Raises:
        ValueError: If ``training_step`` fails and the module has no example, or ``forward`` fails on the
            module's example.
    """
    step, forward, failure = _find_step(trainer, module, batch)
    example = own_example(module)
    if step is None and example is None:
        raise ValueError(
            f"{type(module).__name__}.training_step does not run outside the loop ({failure!r}): give the"
            " module an example_input_array."
        )
    if example is not None:
        forward = _example_probe(trainer, module, example)
    elif forward is not None and _failure(forward, module) is not None:
        forward = None  # forward has no evaluation mode, or takes other arguments in it
    steps: list[Probe] = []
    if step is None:
        rank_zero_info(f"training_step is not looked at, it fails outside the loop with {failure!r}.")
    else:
        steps += [step, *(each for each in step.elsewhere if _failure(each, module) is None)]
    if overrides(module, "validation_step"):
        for loader, each in (validation_batches or {0: batch}).items():
            steps += _validation_passes(trainer, module, each, loader)
    first, *others = steps if forward is None else (forward, *steps)
    return first.with_further_passes(others)


def _find_step(
    trainer: Trainer, module: LightningModule, batch: Any
) -> tuple[StepProbe | None, ForwardProbe | None, Exception | None]:
    """Run ``training_step`` on a copy of a module: on two examples of a batch or, if that fails, on the batch.

    Under manual optimization a step that fails after its first backward pass is run up to it.

    Returns:
        A probe of the step, one of its first call of ``forward``, and the exception; each ``None`` if there is
        none.
    """
    ends = (False,) if module.automatic_optimization else (False, True)
    for examples in (map_tensors(batch, _first_examples), batch):
        for to_backward in ends:
            step = StepProbe(trainer, examples, to_backward=to_backward)
            forward, failure = forward_in(step, trainer, module, training=True)
            if failure is None:
                return step, forward, None
    return None, None, failure


def _validation_passes(trainer: Trainer, module: LightningModule, batch: Any, loader: int) -> list[Probe]:
    """Return a pass of ``validation_step`` on two examples of a batch or on the batch, if one of them runs."""
    for examples in (map_tensors(batch, _first_examples), batch):
        step = StepProbe(trainer, examples, "validation_step", loader=loader)
        if (failure := _failure(step, module)) is None:
            return [step]
    rank_zero_info(f"validation_step is not looked at, it fails outside the loop with {failure!r}.")
    return []


def training_loss(trainer: Trainer) -> LossFunction:
    """Return a function that computes the loss of ``training_step`` for a copy of a module and a batch.

    The function raises NoLossError if ``training_step`` returns no loss.

    Args:
        trainer: The module's Trainer, which does not change.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result, losses, _ = StepProbe(trainer, batch, to_backward=True)(model)
        returned = result.get("loss") if isinstance(result, Mapping) else result
        found = losses[0] if losses else returned
        if not torch.is_tensor(found):
            raise NoLossError(f"training_step gives {found!r} for a held batch, and no loss.")
        return found

    return loss


def forward_probe(trainer: Trainer, module: LightningModule, batch: Any) -> Probe:
    """Return a probe of ``forward`` with the arguments that ``training_step`` calls it with.

    Its further passes are those steps of a fit that run outside the loop.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it.

    Raises:
        ValueError: If ``training_step`` fails before it calls ``forward``, or never calls it.
    """
    forward, failure = forward_in(StepProbe(trainer, batch), trainer, module, training=True)
    if forward is None:  # a step that fails after it has called forward is no problem
        why = "it does not call forward" if failure is None else repr(failure)
        raise ValueError(
            f"{type(module).__name__}.training_step does not show what forward is called with ({why}): give the"
            " module an example_input_array."
        )
    if failure is not None:
        return forward
    return forward.with_further_passes(
        each for each in find_probe(trainer, module, batch).passes if isinstance(each, StepProbe)
    )


def capture_example(trainer: Trainer, module: LightningModule, batch: Any) -> ForwardCapture:
    """Run ``training_step`` on a copy of a module, and return the capture of the first example of its input.

    The capture is empty if the step does not call ``forward``, or fails before.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it.
    """
    capture, failure = _captured(StepProbe(trainer, batch), module, first_of, training=True)
    if failure is not None:
        rank_zero_info(f"training_step fails outside the loop with {failure!r}.")
    return capture


def modules_called(trainer: Trainer, module: LightningModule, batch: Any) -> tuple[list[str], Exception | None]:
    """Run ``training_step`` on a copy of a module, and return which modules with parameters it calls itself.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it.

    Returns:
        The names of the modules, each once, in order, and the exception if the step failed; the name of the
        module itself is empty.
    """
    twin = copy_model(module)
    with outermost_calls(twin) as calls:
        failure = failure_of(StepProbe(trainer, batch), twin, training=True)
    return list(dict.fromkeys(calls.names)), failure


def failure_of(
    run: Callable[[LightningModule], object], twin: LightningModule, *, training: bool = False
) -> Exception | None:
    """Run a copy of a module, and return the exception if that fails.

    Args:
        run: Runs the copy.
        twin: The copy, as ``copy_model`` returns it.
        training: Whether to run it in training mode.
    """
    try:
        with pass_mode(twin, training=training):
            run(twin)
    except Exception as error:  # a user's code may raise anything
        return error
    return None


def _failure(probe: Probe, module: LightningModule) -> Exception | None:
    """Return the exception if a probe fails on a copy of a module."""
    return failure_of(probe, copy_model(module), training=probe.training)


def _captured(
    step: StepProbe, module: LightningModule, take: Callable[[Tensor], Tensor], *, training: bool
) -> tuple[ForwardCapture, Exception | None]:
    """Run a step on a copy; return what ``forward`` was called with, and the exception if the step failed."""
    twin = copy_model(module)
    capture = ForwardCapture(twin, take)
    failure = failure_of(step, twin, training=training)
    capture.release()
    return capture, failure


def forward_in(
    step: StepProbe, trainer: Trainer, module: LightningModule, *, training: bool
) -> tuple[ForwardProbe | None, Exception | None]:
    """Run a step on a copy of a module, in training or evaluation mode.

    Returns:
        A probe of its first call of ``forward``, if there was one, and the exception if the step failed.
    """
    capture, failure = _captured(step, module, lambda tensor: tensor.detach().clone(), training=training)
    given = capture.arguments
    return (None if given is None else ForwardInFitProbe(trainer, *given)), failure


def _example_probe(trainer: Trainer, module: LightningModule, example: Any) -> ForwardProbe:
    """Return a probe of ``forward`` on the module's ``example_input_array``, after a trial on a copy.

    Raises:
        ValueError: If ``forward`` fails.
    """
    probe = ForwardInFitProbe(trainer, to_model(example, module))
    failure = _failure(probe, module)
    if failure is not None:
        raise ValueError(
            f"{type(module).__name__} cannot run on its example_input_array ({failure!r}): give it one that"
            " forward takes, or none, and an example of a training batch is taken."
        ) from failure
    return probe


def _first_examples(tensor: Tensor) -> Tensor:
    return tensor[:_EXAMPLES] if tensor.ndim else tensor
