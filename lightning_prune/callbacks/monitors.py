"""ModelCheckpoint and EarlyStopping for pruning: metrics measured before the final sparsity do not count."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_prune.callbacks.pruning import pruning_callbacks
from lightning_prune.training.lightning_packages import (
    Callback,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    Trainer,
)


class _BestAtFinalSparsity(Callback, ABC):
    """Base of callbacks with a best score: drops the best if the sparsity has changed since it was measured."""

    monitor: Any
    _sparsity: list[float] | None = None
    _metric_before: Tensor | None = None  # as logged before the last event

    @abstractmethod
    def _drop_best(self) -> None:
        """Drop the best score."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Drop the best score if there was a pruning event; a metric logged before it no longer counts."""
        sparsity = [each.sparsity for each in pruning_callbacks(trainer)]
        if sparsity != self._sparsity:
            self._sparsity = sparsity
            self._metric_before = self._logged(trainer)
            self._drop_best()

    def _metric_counts(self, trainer: Trainer) -> bool:
        """Return whether the monitored metric was measured at the final sparsity."""
        # in all processes the answer of rank 0, as in a guard
        settled: bool = trainer.strategy.broadcast(all(each.settled for each in pruning_callbacks(trainer)))
        older = self._metric_before is not None and self._logged(trainer) is self._metric_before
        return settled and not older

    def _logged(self, trainer: Trainer) -> Tensor | None:
        # each logged value is a new tensor: the same object is the same measurement
        return trainer.callback_metrics.get(self.monitor or "")

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the sparsity at which the best score was measured."""
        return {**super().state_dict(), "sparsity": self._sparsity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state."""
        super().load_state_dict(state_dict)
        self._sparsity = state_dict.get("sparsity")


class PrunedCheckpoint(_BestAtFinalSparsity, ModelCheckpoint):
    """A ModelCheckpoint whose best checkpoint is the best at the final sparsity.

    With ``monitor``, no checkpoint is the best while a PruningCallback of the Trainer has an event left or,
    with a guard, while its present round is not good. The best from before the last event, in this or an
    earlier fit, does not count either. ``save_last`` saves all the same. If a guard undoes the last round when
    the fit ends, the restored network is saved, and is the best. Takes the arguments of ``ModelCheckpoint``.
    """

    _training_ended = False

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether the present network is among the best."""
        if self._metric_counts(trainer):
            return super().check_monitor_top_k(trainer, current)
        if self.save_last:
            self._last_global_step_saved = (
                trainer.global_step
            )  # "last" is saved only at a step with a checkpoint
            self._last_checkpoint_saved = ""  # there is no other checkpoint to link to
        return False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training has not ended yet."""
        super().on_fit_start(trainer, pl_module)
        self._training_ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the network that a guard has restored, if it undid the last round."""
        super().on_train_end(trainer, pl_module)
        self._training_ended = True
        self._save_restored(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save it here if Lightning had no training left to do, and did not call ``on_train_end``."""
        super().on_fit_end(trainer, pl_module)
        if not self._training_ended:
            self._save_restored(trainer)

    def _save_restored(self, trainer: Trainer) -> None:
        if any(each.undone for each in pruning_callbacks(trainer)):
            candidates = self._monitor_candidates(trainer)
            self._drop_best()  # of the undone network
            self.best_model_path = self.format_checkpoint_name(candidates)
            self.current_score = None
            self._save_checkpoint(trainer, self.best_model_path)
            self._save_last_checkpoint(trainer, candidates)

    def _drop_best(self) -> None:
        self.best_k_models.clear()
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = None


class PrunedEarlyStopping(_BestAtFinalSparsity, EarlyStopping):
    """An EarlyStopping that does not stop because the metric gets worse after a pruning event.

    While a PruningCallback of the Trainer has an event left, training stops only if the metric is missing or,
    with ``check_finite``, not finite. The first metric after the last event is the best so far. With a guard,
    metrics of a round that is not good do not count. Takes the arguments of ``EarlyStopping``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move this callback after the PruningCallbacks in the Trainer's list."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        last = max((callbacks.index(each) for each in pruning_callbacks(trainer)), default=0)
        if callbacks.index(self) < last:
            others = [each for each in callbacks if each is not self]
            # a new list: Lightning iterates over the present one
            trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a metric logged in training steps."""
        self._run_check(super().on_train_epoch_end, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check a metric logged in validation."""
        self._run_check(super().on_validation_end, trainer, pl_module)

    def _run_check(
        self, check: Callable[[Trainer, LightningModule], None], trainer: Trainer, module: LightningModule
    ) -> None:
        if self._metric_counts(trainer):
            check(trainer, module)
        elif any(each.events_left for each in pruning_callbacks(trainer)):
            limits = self.stopping_threshold, self.divergence_threshold, self.patience
            self.stopping_threshold = self.divergence_threshold = None
            self.patience = sys.maxsize
            try:
                check(trainer, module)
            finally:
                self.stopping_threshold, self.divergence_threshold, self.patience = limits
                self._drop_best()

    def _drop_best(self) -> None:
        self.wait_count = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
