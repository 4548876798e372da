"""Training batches that a fit holds for what asks for the loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.core import schema
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import evaluation_mode
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.pruner import Pruner
from lightning_prune.statistics.losses import Losses
from lightning_prune.training.sandbox import NoLossError, training_loss
from lightning_prune.training.trainer_queries import gather_objects

# a batch of each process in each
CALIBRATION_BATCHES = schema.sequence(
    schema.satisfying(schema.sequence(schema.anything), lambda batches: len(batches) > 0, "a batch at least")
)


class CalibrationBatches:
    """Copies of the first batches of a fit that give a loss, on the CPU, those of all processes in each.

    Args:
        count: How many are wanted.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._batches: list[list[Any]] = []
        self._tried = False
        self._saved = 0

    def hold(self, trainer: Trainer, module: LightningModule, pruner: Pruner, batch: Any) -> None:
        """Holds one more, if it is wanted; with the first of a fit, what asks for the loss is tried.

        Raises:
            ValueError: If it cannot be kept, what comes first or was saved gives no loss, or the loss would be
                asked for too often.
        """
        self._try_saved(trainer, module)
        if len(self._batches) < self._count:
            found = gather_objects(trainer, _cpu_copy(batch) if _gives_loss(trainer, module, batch) else None)
            if all(each is not None for each in found):
                self._batches.append(found)
            elif not self._batches:
                raise ValueError(
                    "training_step gives no loss for the first batch: take parts that do not ask for it."
                )
        if self._count and not self._tried:
            self._tried = True
            seconds = pruner.rehearse(self._losses(trainer))
            rank_zero_info(f"Asking for the loss takes about {seconds:.3g} s in each pruning event.")

    def _try_saved(self, trainer: Trainer, module: LightningModule) -> None:
        """Makes sure that each batch out of a checkpoint is one that this module can be trained on."""
        tried, self._saved = self._saved, 0
        for place, each in enumerate(self._batches[:tried]):
            try:
                gives = _gives_loss(trainer, module, each[trainer.global_rank % len(each)])
                problem = None if gives else "gives no loss"
            except Exception as error:  # a user's training_step may raise anything
                problem = f"fails with {error!r}"
            # all processes stop if one does
            problems = [found for found in gather_objects(trainer, problem) if found is not None]
            if problems:
                raise ValueError(f"{PRUNING_STATE}: training_step {problems[0]} for held[{place}].")

    def losses(self, trainer: Trainer) -> Losses | None:
        """What can be asked for now."""
        return self._losses(trainer) if self._batches else None

    def _losses(self, trainer: Trainer) -> Losses:
        rank = trainer.global_rank
        # after a resume there may be more processes than before
        own = [each[rank % len(each)] for each in self._batches]
        add_up = partial(trainer.strategy.reduce, reduce_op="sum")
        return Losses(training_loss(trainer), own, add_up, progress=trainer.is_global_zero)

    def clear(self) -> None:
        """Nothing more will be asked for."""
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"held": [list(each) for each in self._batches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what a saved state holds, as far as it is wanted."""
        self._batches = [list(each) for each in state["held"]][: self._count]
        self._saved = len(self._batches)


def _gives_loss(trainer: Trainer, module: LightningModule, batch: Any) -> bool:
    """Whether the step does not skip the batch."""
    twin = copy_model(module)
    try:
        with evaluation_mode(twin):
            training_loss(trainer)(twin, batch)
    except NoLossError:
        return False
    except Exception as error:  # a user's step may raise anything
        raise ValueError(
            f"training_step does not run outside the loop ({error!r}), where the loss is asked for: take parts"
            " that do not ask for it."
        ) from error
    return True


def _cpu_copy(value: Any) -> Any:
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
        " lists, tuples and dicts: make these in the collate function, or take parts that ask for no loss."
    )
