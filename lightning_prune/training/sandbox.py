"""Runs ``training_step`` or ``forward`` outside the fit loop, on copies, without a change to the fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import ForwardProbe, Probe, own_example, pass_mode
from lightning_prune.core.tensors import map_tensors, to_model
from lightning_prune.statistics.losses import LossFunction
from lightning_prune.training.hooks import ExampleCapture
from lightning_prune.training.stub_trainer import use_stubs_

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


def find_probe(trainer: Trainer, module: LightningModule, batch: Any, validation_batch: Any = None) -> Probe:
    """Return a probe of a module with the passes that a fit makes.

    The first pass is one of ``forward`` in evaluation mode, on the module's ``example_input_array`` or, if it
    has none, on the arguments that ``training_step`` calls ``forward`` with. Further passes are
    ``training_step``, for the first and the second number of a batch, and ``validation_step``, as far as they
    run outside the loop. If no call of ``forward`` runs, ``training_step`` is the first pass.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batch: A training batch, as ``training_step`` gets it. The probe keeps its first two examples, or all of
            it if the step fails on two.
        validation_batch: A batch of validation, as ``validation_step`` gets it; ``None`` to take ``batch``.

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
    elif forward is not None and failure_of(forward, copy_model(module)) is not None:
        forward = None  # forward has no evaluation mode, or takes other arguments in it
    steps: list[Probe] = []
    if step is None:
        rank_zero_info(f"training_step is not looked at, it fails outside the loop with {failure!r}.")
    else:
        second = step.with_number(1)
        steps += [step, second] if failure_of(second, copy_model(module)) is None else [step]
    if is_overridden("validation_step", module):
        steps += _validation_passes(trainer, module, batch if validation_batch is None else validation_batch)
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
            forward, failure = _forward_in(step, trainer, module)
            if failure is None:
                return step, forward, None
    return None, None, failure


def _validation_passes(trainer: Trainer, module: LightningModule, batch: Any) -> list[Probe]:
    """Return a pass of ``validation_step`` on two examples of a batch or on the batch, if one of them runs."""
    for examples in (map_tensors(batch, _first_examples), batch):
        step = StepProbe(trainer, examples, "validation_step")
        if (failure := failure_of(step, copy_model(module))) is None:
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
    forward, failure = _forward_in(StepProbe(trainer, batch), trainer, module)
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
    failure = failure_of(StepProbe(trainer, batch), twin)
    if failure is not None:
        rank_zero_info(f"training_step fails outside the loop with {failure!r}.")
    capture.release()
    return capture


def failure_of(run: Callable[[LightningModule], object], twin: LightningModule) -> Exception | None:
    """Run a copy of a module, and return the exception if that fails.

    Args:
        run: A probe, or a function that runs the copy in evaluation mode.
        twin: The copy, as ``copy_model`` returns it.
    """
    try:
        with pass_mode(twin, training=getattr(run, "training", False)):
            run(twin)
    except Exception as error:  # a user's code may raise anything
        return error
    return None


def _forward_in(
    step: StepProbe, trainer: Trainer, module: LightningModule
) -> tuple[ForwardProbe | None, Exception | None]:
    """Run a step on a copy of a module.

    Returns:
        A probe of its first call of ``forward``, if there was one, and the exception if the step failed.
    """
    twin = copy_model(module)
    calls: list[ForwardProbe] = []
    forward = twin.forward

    def keep_first(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            probe = ForwardInFitProbe(trainer, args, kwargs)
            calls.append(probe.map_tensors(lambda tensor: tensor.detach().clone()))
        return forward(*args, **kwargs)

    vars(twin)["forward"] = keep_first  # in place of a hook, which self.forward(x) does not call
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


def _first_examples(tensor: Tensor) -> Tensor:
    return tensor[:_EXAMPLES] if tensor.ndim else tensor
