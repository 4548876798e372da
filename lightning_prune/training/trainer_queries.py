"""Queries to a Trainer and checks of it: fit length, loss scale, weight averages, processes, data, reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.core.averages import Average, average_of
from lightning_prune.schedules.moments import FitLength, TimeUnit
from lightning_prune.training.hooks import parameters_in
from lightning_prune.training.lightning_packages import (
    LightningModule,
    Strategy,
    Trainer,
    classes,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_prune.training.snapshots import TrainingObjects
from lightning_prune.units.masks import MaskStore

_ACCUMULATION = classes("callbacks", "GradientAccumulationScheduler")
_FINETUNING = classes("callbacks", "BaseFinetuning")
_MODEL_PRUNING = classes("callbacks", "ModelPruning")
_SWA = classes("callbacks", "StochasticWeightAveraging")
_OWN_FORM = (*classes("strategies", "DeepSpeedStrategy"), *classes("strategies", "FSDPStrategy"))
_DIVIDED = classes("strategies", "ModelParallelStrategy")
_MULTI_PROCESSING = classes("strategies.launchers", "_MultiProcessingLauncher")

_Result = TypeVar("_Result")

# what a warning says where steps are not seen
BY_HAND = " Under manual optimization call self.manual_backward(loss), and step what self.optimizers() returns."


def shows_progress(trainer: Trainer) -> bool:
    """Return whether this process shows progress bars: the first one, unless the Trainer has none."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def fit_length(trainer: Trainer) -> FitLength:
    """Return how many epochs and optimizer steps the fit trains, as far as they are known."""
    batches, accumulated = trainer.num_training_batches, _accumulation_factors(trainer)
    constant = not math.isinf(batches) and len({*accumulated}) == 1
    optimizers = max(1, len(trainer.optimizers))
    return FitLength(
        epochs=training_epochs(trainer),
        # max_steps counts the steps of each optimizer
        steps=None if trainer.max_steps == -1 else -(-trainer.max_steps // optimizers),
        steps_per_epoch=math.ceil(batches / accumulated[0]) if constant else None,
    )


def _accumulation_factors(trainer: Trainer) -> list[int]:
    """Return how many batches make an optimizer step: the number at the first epoch and after each change."""
    end = training_epochs(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _ACCUMULATION):
            changes = sorted(callback.scheduling.items())
            return [factor for epoch, factor in changes if epoch == 0 or end is None or epoch < end]
    return [trainer.accumulate_grad_batches]


def training_epochs(trainer: Trainer) -> int | None:
    """Return how many epochs train; ``None`` if there is no limit.

    The epoch that SWA adds, to update the batch norm statistics of its average, does not count.
    """
    if trainer.max_epochs is None or trainer.max_epochs == -1:
        return None
    return min([trainer.max_epochs, *(int(each.swa_end) + 1 for each in _swa(trainer))])


def averaged_by_callbacks(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    """Return the weight averages that callbacks hold, each with the class name of its callback.

    These are the modules inside an ``AveragedModel``, and the average of Lightning's SWA. Any other copy of a
    network, such as a teacher, is not a weight average.
    """
    held = [
        (type(callback).__name__, value.module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for value in vars(callback).values()
        if isinstance(value, AveragedModel)
    ]
    held += [
        (type(each).__name__, each._average_model) for each in _swa(trainer) if each._average_model is not None
    ]
    return held


def averages_in_callbacks(trainer: Trainer, model: nn.Module) -> list[Average]:
    """Return the weight averages that callbacks hold of a model or of a part of it."""
    found = [average_of(model, module) for _, module in averaged_by_callbacks(trainer)]
    return [average for average in found if average is not None]


def _swa(trainer: Trainer) -> list[Any]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, _SWA)]


def first_metric_position(trainer: Trainer, unit: TimeUnit) -> int:
    """Return the earliest position in a fit at which a metric may have been measured.

    A metric is measured at a validation or at the end of an epoch.

    Args:
        trainer: The Trainer, before its first batch.
        unit: Unit of the position: steps, or epochs, of which only whole ones count.
    """
    epoch = trainer.num_training_batches
    validation = trainer.val_check_batch if trainer.enable_validation else epoch
    if unit is TimeUnit.EPOCH or validation is None or math.isinf(epoch):
        return 1  # in these units no position is known: validation is by the clock, or data have no length
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return 1  # the guard compares no metric
    return math.ceil(min(epoch, validation) / _accumulation_factors(trainer)[0])


def loss_scale(trainer: Trainer) -> float:
    """Return the factor by which the loss, and so its gradients, are scaled at present."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def will_step(trainer: Trainer) -> bool:
    """Return whether the optimizer step will be taken: a loss scaler skips it if a gradient is inf or nan."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return True
    grads = (parameter.grad for parameter in trainer.lightning_module.parameters())
    return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


class WarnOnce:
    """Prints each warning once, until it is cleared; in a fast_dev_run as information."""

    def __init__(self) -> None:
        self._printed: set[str] = set()

    def __call__(self, trainer: Trainer, text: str) -> None:
        """Print a warning, unless it was printed before."""
        if text not in self._printed:
            say = rank_zero_info if trainer.fast_dev_run else rank_zero_warn  # type: ignore[attr-defined]
            say(text)
            self._printed.add(text)

    def clear(self) -> None:
        """Allow each warning to be printed again."""
        self._printed.clear()


def training_objects(trainer: Trainer, module: LightningModule) -> TrainingObjects:
    """Return the module, optimizers and learning-rate schedules of a fit."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return TrainingObjects(module, trainer.optimizers, schedules)


def trained_parameters(trainer: Trainer, module: LightningModule) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that a fit trains: those in optimizers that require gradients.

    Where a finetuning callback thaws parts of the module later, parameters that are frozen now count, too. If
    Lightning has no optimizer, all that require gradients do.
    """
    held = {id(each) for optimizer in trainer.optimizers for each in parameters_in(optimizer)}
    thaws = any(isinstance(each, _FINETUNING) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return {
        name: each
        for name, each in module.named_parameters()
        if ((not held or id(each) in held) if each.requires_grad else thaws)
    }


def gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    """Return the value of each process, in the order of their ranks."""
    if trainer.world_size == 1:
        return [value]
    found = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found


def all_succeed(trainer: Trainer, action: Callable[[], _Result]) -> _Result:
    """Return the result of an action that each process carries out, or raise in all of them if one fails.

    Raises:
        Exception: That of this process; RuntimeError, with its text, if it is one of another process.
    """
    try:
        result, failure = action(), None
    except Exception as error:
        failure = error
    problems = gather_objects(trainer, failure and str(failure))
    if failure is not None:
        raise failure
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise RuntimeError(f"rank {rank} has failed: {problem}")
    return result


def check_same_masks(trainer: Trainer, store: MaskStore) -> None:
    """Raise RuntimeError, in all processes, if masks differ among processes that hold the same weights."""
    if trainer.world_size == 1 or store.shards.sharded:
        return
    digests = gather_objects(trainer, store.digest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RuntimeError(
            f"the masks of rank {', '.join(map(str, others))} are not those of rank 0 after a pruning event:"
            " weights, and what the criterion makes of them, must be the same on all ranks."
        )


def monitored_metric(trainer: Trainer) -> str | None:
    """Return the name of the metric that a checkpoint or early-stopping callback monitors, if one does."""
    watching = (*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks)
    names = (getattr(callback, "monitor", None) for callback in watching)
    return next((name for name in names if name), None)


def why_unfinished(trainer: Trainer, module: LightningModule) -> str:
    """Return why a fit ended before its last event, and what to do, as a sentence; empty if it is not known."""
    if trainer.global_step == 0 and not module.automatic_optimization:
        return BY_HAND
    # with patience=0 it has waited for 1 check when it stops
    if any(each.wait_count >= max(1, each.patience) for each in trainer.early_stopping_callbacks):
        return " EarlyStopping ended it: PrunedEarlyStopping waits."
    return ""


def check_strategy(strategy: Strategy, whole: Sequence[str]) -> None:
    """Check that pruning can work with the form in which a strategy keeps parameters.

    Args:
        strategy: The Trainer's strategy.
        whole: The callback's arguments that need whole parameters in each process, for the error message.

    Raises:
        ValueError: If the strategy flattens or copies parameters, or divides them and ``whole`` is not empty.
    """
    name = type(strategy).__name__
    if isinstance(strategy, _OWN_FORM):
        raise ValueError(
            f"strategy={name} keeps parameters in a form of its own, in which they cannot be pruned: use DDP or"
            " FSDP2, which is ModelParallelStrategy with fully_shard in configure_model."
        )
    if isinstance(strategy, _DIVIDED) and whole:
        raise ValueError(
            f"strategy={name} splits the model up: {', '.join(whole)} cannot work on parts of it. Do without,"
            " or keep it whole, as with DDP or a single device."
        )


def check_copied(strategy: Strategy, what: str) -> None:
    """Raise ValueError if a strategy does not keep parameters in a form in which a model can be copied.

    Args:
        strategy: The Trainer's strategy.
        what: What would make the copy, for the error message.
    """
    if isinstance(strategy, (*_OWN_FORM, *_DIVIDED)):
        raise ValueError(
            f"strategy={type(strategy).__name__} divides parameters among processes or keeps them in a form of"
            f" its own, in which {what} cannot copy the network: use DDP or a single device."
        )


def check_callbacks(trainer: Trainer) -> None:
    """Raise ValueError if another callback of the Trainer prunes, too."""
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, _MODEL_PRUNING):
            raise ValueError(
                f"{type(each).__name__} replaces weights by some that it masks itself, so that PruningCallback"
                " cannot mask them: leave one of the two out of the Trainer."
            )


def check_launcher(trainer: Trainer, compact: bool | str) -> None:
    """Check for a launcher that spawns or forks processes, which return only the weights after the fit.

    The log then says what this process will lack.

    Args:
        trainer: The Trainer, before its first batch.
        compact: The callback's argument: whether the module is to be compacted, whereas the module in this
            process would keep its shapes.

    Raises:
        ValueError: If there is such a launcher, and the module is to be compacted.
    """
    if not isinstance(trainer.strategy.launcher, _MULTI_PROCESSING):
        return
    if compact:
        raise ValueError(
            f"compact={compact!r} shrinks the module of the process that trains it, which does not come back"
            " from a strategy that spawns or forks: use strategy='ddp' or a single device."
        )
    rank_zero_info(
        "The processes of a strategy that spawns or forks do not come back: the PruningCallback here will have"
        " neither masks nor a report, and another fit would begin as if dense. Go on from a checkpoint that the"
        " fit saves, or use strategy='ddp'."
    )
