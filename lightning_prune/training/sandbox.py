"""``training_step`` outside the loop, on a copy: weights, random state, metrics, logs, optimizers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import ForwardProbe, Probe, evaluation_mode, to_model, transfer
from lightning_prune.statistics.losses import LossFunction
from lightning_prune.training.hooks import ExampleCapture
from lightning_prune.training.stub_trainer import BackwardError, use_stubs_

_Watch = TypeVar("_Watch")
_EXAMPLES = 2  # of a batch: one alone would hide what a squeeze does


class NoLossError(ValueError):
    """``training_step`` skips a batch."""


class ForwardInFitProbe(ForwardProbe):
    """Calls ``forward`` of a copy of a module in a fit, which may read from its Trainer.

    Args:
        trainer: The module's; it is read and nothing else.
        example: As for :class:`ForwardProbe`.
        keywords: The same.
    """

    def __init__(self, trainer: Trainer, example: Any, keywords: Mapping[str, Any] | None = None) -> None:
        super().__init__(example, keywords)
        self._trainer = trainer

    def __call__(self, model: nn.Module) -> Any:
        """The model's outputs."""
        use_stubs_(model, self._trainer)
        return super().__call__(model)


class TrainingStepProbe(Probe):
    """Runs ``training_step`` on one batch, up to its first manual backward pass.

    Args:
        trainer: The module's; it is read and nothing else.
        batch: As ``training_step`` gets it.
    """

    def __init__(self, trainer: Trainer, batch: Any) -> None:
        self._trainer = trainer
        self._batch = batch

    def __call__(self, model: nn.Module) -> Any:
        """What ``training_step`` returns, or the loss that it wanted to go back from."""
        assert isinstance(model, LightningModule)
        use_stubs_(model, self._trainer)
        # by position, as Lightning gives it: a second argument may have any name
        given = (0,) if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2) else ()
        result: Any = None
        failure: Exception | None = None
        batch = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, self._batch)
        with isolate_rng(), _dtype_of(model):  # of which the first restores nothing after an exception
            try:
                result = model.training_step(batch, *given)
            except BackwardError as stop:
                result = stop.loss
            except Exception as error:  # a user's step may raise anything
                failure = error
        if failure is not None:
            raise failure
        return result

    def to(self, target: torch.dtype | torch.device) -> TrainingStepProbe:
        """The same batch."""
        return TrainingStepProbe(self._trainer, transfer(self._batch, target))


@contextmanager
def _dtype_of(model: nn.Module) -> Iterator[None]:
    """What a step makes is of the type of the weights, as precisions that convert them see to in a fit."""
    before = torch.get_default_dtype()
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), before)
    try:
        if before == torch.float32:  # or somebody has chosen another one
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


def find_probe(trainer: Trainer, module: LightningModule, batch: Any) -> Probe:
    """What shows how data run through a module: its ``forward``, on an example, and its ``training_step``.

    Args:
        trainer: The module's.
        module: Stays as it is.
        batch: A training batch, as ``training_step`` gets it. The example is the module's own
            ``example_input_array`` if it has one, otherwise what the step gives to ``forward``.

    Raises:
        ValueError: If neither runs, or not on the module's own example.
    """
    trials: list[Callable[[], Any]] = [lambda: tree_map(_first_examples, batch), lambda: batch]
    example, failures = module.example_input_array, []
    for few in trials:
        step = TrainingStepProbe(trainer, few())
        capture, failure = _run_watched(step, module, partial(_ArgumentCapture, trainer))
        if failure is not None:
            failures.append(failure)
            continue
        forward = capture.probe if example is None else _example_probe(trainer, module, example)
        return step if forward is None else forward.with_others(step)
    if example is None:
        raise ValueError(
            f"{type(module).__name__}.training_step does not run outside the loop ({failures[-1]!r}): give the"
            " module an example_input_array."
        )
    rank_zero_info(f"training_step is not looked at, it fails outside the loop with {failures[-1]!r}.")
    return _example_probe(trainer, module, example)


def training_loss(trainer: Trainer) -> LossFunction:
    """What ``training_step`` makes of a batch: its loss, on a copy of the module.

    Args:
        trainer: The module's; it is read and nothing else.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result = TrainingStepProbe(trainer, batch)(model)
        found = result.get("loss") if isinstance(result, Mapping) else result
        if not torch.is_tensor(found):
            raise NoLossError(f"training_step gives {found!r} for a held batch, and no loss.")
        return found

    return loss


def forward_probe(trainer: Trainer, module: LightningModule, batch: Any) -> ForwardProbe:
    """What ``training_step`` gives to ``forward``.

    Args:
        trainer: The module's.
        module: Stays as it is.
        batch: As ``training_step`` gets it.

    Raises:
        ValueError: If the step does not run outside the loop, or does not call ``forward``.
    """
    capture, failure = _run_watched(
        TrainingStepProbe(trainer, batch), module, partial(_ArgumentCapture, trainer)
    )
    if capture.probe is None:  # a step may also fail after its call of forward
        why = "it does not call forward" if failure is None else repr(failure)
        raise ValueError(
            f"{type(module).__name__}.training_step does not show what forward is called with ({why}): give the"
            " module an example_input_array."
        )
    return capture.probe


def capture_example(trainer: Trainer, module: LightningModule, batch: Any) -> ExampleCapture:
    """Lets a copy of the module show, as far as it does, what ``forward`` is given.

    Args:
        trainer: The module's.
        module: Stays as it is.
        batch: As ``training_step`` gets it.
    """
    capture, failure = _run_watched(TrainingStepProbe(trainer, batch), module, ExampleCapture)
    if failure is not None:
        rank_zero_info(f"training_step fails outside the loop with {failure!r}.")
    capture.release()
    return capture


def _run_watched(
    step: TrainingStepProbe, module: LightningModule, watch: Callable[[LightningModule], _Watch]
) -> tuple[_Watch, Exception | None]:
    """Runs a step on a copy of a module that something watches; a user's step may raise anything."""
    twin = copy_model(module)
    watching = watch(twin)
    try:
        with evaluation_mode(twin):
            step(twin)
    except Exception as error:
        return watching, error
    return watching, None


def _example_probe(trainer: Trainer, module: LightningModule, example: Any) -> ForwardProbe:
    """A pass on the module's ``example_input_array``, once it has been tried."""
    probe = ForwardInFitProbe(trainer, to_model(example, module))
    twin = copy_model(module)
    try:
        with evaluation_mode(twin):
            probe(twin)
    except Exception as error:  # a user's forward may raise anything
        raise ValueError(
            f"{type(module).__name__} cannot run on its example_input_array ({error!r}): give it one that"
            " forward takes, or none, and an example of a training batch is taken."
        ) from error
    return probe


class _ArgumentCapture:
    """What a module's ``forward`` is first called with."""

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        self.probe: ForwardProbe | None = None
        self._trainer = trainer
        self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.probe = ForwardInFitProbe(self._trainer, args, kwargs)
        self._handle.remove()


def _first_examples(value: Any) -> Any:
    return value[:_EXAMPLES] if torch.is_tensor(value) and value.ndim else value
