"""Calibration batches: training batches that a fit keeps for parts that run the network at an event."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lightning_prune.core import schema
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.tensors import cast_or_move
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.pruner import Pruner
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.losses import Losses
from lightning_prune.training.calibration_passes import calibration_passes
from lightning_prune.training.lightning_packages import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_prune.training.sandbox import NoLossError, failure_of, training_loss
from lightning_prune.training.trainer_queries import gather_objects

# each entry holds one batch per process
CALIBRATION_BATCHES = schema.sequence(
    schema.satisfying(schema.sequence(schema.anything), lambda batches: len(batches) > 0, "a batch at least")
)

_WITHOUT_LOSS = (
    "take a criterion and a selector that do not evaluate the loss, as Oracle, OptimalBrainDamage and"
    " ParticleFilter do"
)


class CalibrationBatches:
    """CPU copies of the first training batches of a fit that yield what is asked for.

    Each of them is a list with the batch of every process, in the order of their ranks.

    Args:
        count: How many to keep; 0 if no part runs the network.
        losses: Whether the loss is evaluated on them.
        passes: Whether layers are calibrated on them.
    """

    def __init__(self, count: int, *, losses: bool, passes: bool) -> None:
        self._count, self._needs_losses, self._needs_passes = count, losses, passes
        self._batches: list[list[Any]] = []
        self._estimated = False
        self._unchecked = 0  # batches loaded from a checkpoint that this module was not tried on yet

    def add_batch(self, trainer: Trainer, module: LightningModule, pruner: Pruner, batch: Any) -> None:
        """Keep a copy of a batch, unless there are enough; try the loss once a fit, as soon as there is one.

        A batch without a loss is skipped, if it is not the first.

        Args:
            trainer: The Trainer of the fit.
            module: The module that is pruned; it does not change.
            pruner: Its pruner, which estimates how long evaluations of the loss take.
            batch: The batch, as ``training_step`` gets it.

        Raises:
            ValueError: If a checkpoint cannot hold the batch, ``training_step`` does not run on the first batch
                or a saved one, or returns no loss that is needed, or an event would evaluate the loss too
                often.
        """
        self._check_loaded(trainer, module)
        if len(self._batches) < self._count:
            usable = self._is_usable(trainer, module, batch)
            found = gather_objects(trainer, _cpu_copy(batch) if usable else None)
            if all(each is not None for each in found):
                self._batches.append(found)
            elif not self._batches:
                raise ValueError(f"training_step gives no loss for the first batch: {_WITHOUT_LOSS}.")
        # of a network that is cut, as after a resume, it was estimated before
        estimated = self._estimated or pruner.narrow
        if not estimated and self._needs_losses and (losses := self.losses(trainer)) is not None:
            self._estimated = True
            seconds = pruner.estimate_seconds(losses)
            rank_zero_info(f"Asking for the loss takes about {seconds:.3g} s in each pruning event.")

    def _check_loaded(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise ValueError if this module's ``training_step`` fails on a batch loaded from a checkpoint."""
        unchecked, self._unchecked = self._unchecked, 0
        for place, each in enumerate(self._batches[:unchecked]):
            try:
                usable = self._is_usable(trainer, module, each[trainer.global_rank % len(each)])
                problem = None if usable else "gives no loss"
            except Exception as error:  # a user's training_step may raise anything
                problem = f"fails with {error!r}"
            # all processes stop if one does
            problems = [found for found in gather_objects(trainer, problem) if found is not None]
            if problems:
                raise ValueError(f"{PRUNING_STATE}: training_step {problems[0]} for held[{place}].")

    def _is_usable(self, trainer: Trainer, module: LightningModule, batch: Any) -> bool:
        """Return whether a batch yields a loss, if one is needed.

        Raises:
            ValueError: If the step fails.
        """
        if self._needs_passes:
            calibration_passes(trainer, module, [cast_or_move(batch, module.device)])
        return not self._needs_losses or _gives_loss(trainer, module, batch)

    @property
    def missing(self) -> bool:
        """Whether there is no batch yet, and one is needed."""
        return self._count > 0 and not self._batches

    def losses(self, trainer: Trainer) -> Losses | None:
        """Return the loss on the calibration batches; ``None`` if it is not needed, or before the first one."""
        if not self._batches or not self._needs_losses:
            return None
        add_up = partial(trainer.strategy.reduce, reduce_op="sum")
        return Losses(training_loss(trainer), self._own(trainer), add_up)

    def calibration(self, trainer: Trainer, module: LightningModule) -> Calibration | None:
        """Return passes on the calibration batches; ``None`` if none are needed, or before the first one."""
        if not self._batches or not self._needs_passes:
            return None
        batches = [cast_or_move(each, module.device) for each in self._own(trainer)]
        return Calibration(
            calibration_passes(trainer, module, batches),
            partial(trainer.strategy.reduce, reduce_op="sum"),
            trainer.is_global_zero,
            rank_zero_warn,
        )

    def _own(self, trainer: Trainer) -> list[Any]:
        """Return the batches of this process; there may be more processes than when batches were saved."""
        return [each[trainer.global_rank % len(each)] for each in self._batches]

    def clear(self) -> None:
        """Drop the batches: no event that needs them is left."""
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only."""
        return {"held": [list(each) for each in self._batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the first ``count`` batches of a saved state."""
        self._batches = [list(each) for each in state["held"]][: self._count]
        self._unchecked = len(self._batches)


def _gives_loss(trainer: Trainer, module: LightningModule, batch: Any) -> bool:
    """Return whether ``training_step`` returns a loss for the batch.

    Raises:
        ValueError: If it fails.
    """
    loss = training_loss(trainer)
    failure = failure_of(lambda twin: loss(twin, batch), copy_model(module))
    if failure is None or isinstance(failure, NoLossError):
        return failure is None
    raise ValueError(
        f"training_step does not run outside the loop ({failure!r}), where the loss is asked for:"
        f" {_WITHOUT_LOSS}."
    ) from failure


def _cpu_copy(value: Any) -> Any:
    """Return a copy of a batch on the CPU.

    Raises:
        ValueError: If it holds anything that does not load with ``weights_only=True``.
    """
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(map(_cpu_copy, value))
    if type(value) is dict:
        return {key: _cpu_copy(each) for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"a training batch holds a {type(value).__name__}, but checkpoints take tensors and plain values in"
        " lists, tuples and dicts, not in subclasses of these, such as a namedtuple: make these in the collate"
        f" function, or do without reconstruct= and {_WITHOUT_LOSS}."
    )
