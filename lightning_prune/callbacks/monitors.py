"""Callbacks that judge a network only once it is pruned in full: which is the best, and when to stop."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_prune.callbacks.pruning import pruning_callbacks


class _AfterPruning(Callback, ABC):
    """Forgets what was the best once the sparsity is another, be it that of an earlier fit."""

    monitor: Any
    _sparsity: list[float] | None = None
    _stale: Tensor | None = None

    @abstractmethod
    def _forget(self) -> None:
        """Nothing is the best."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks whether an event has come; what is logged by then is older."""
        sparsity = [each.sparsity for each in pruning_callbacks(trainer)]
        if sparsity != self._sparsity:
            self._sparsity = sparsity
            self._stale = self._logged(trainer)
            self._forget()

    def _counts(self, trainer: Trainer) -> bool:
        """Whether the metric is one of a network that is pruned in full."""
        older = self._stale is not None and self._logged(trainer) is self._stale
        return _settled(trainer) and not older

    def _logged(self, trainer: Trainer) -> Tensor | None:
        # logging puts a new tensor among the metrics
        return trainer.callback_metrics.get(self.monitor or "")

    def state_dict(self) -> dict[str, Any]:
        """With the sparsity of the best."""
        return {**super().state_dict(), "sparsity": self._sparsity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it over."""
        super().load_state_dict(state_dict)
        self._sparsity = state_dict.get("sparsity")


class PrunedCheckpoint(_AfterPruning, ModelCheckpoint):
    """A ModelCheckpoint whose best is the best at the final sparsity.

    With ``monitor``, nothing counts as best while a PruningCallback of the Trainer has an event left or, with a
    guard, while its present round is not good, nor what was the best before the last event, be it in an earlier
    fit; ``save_last`` saves all the same. Where a guard undoes the last round when the fit ends, what came back
    is saved then, and is the best. Takes the arguments of ``ModelCheckpoint``.
    """

    _ended = False

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the present network is among the best."""
        if self._counts(trainer):
            return super().check_monitor_top_k(trainer, current)
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # it is saved only where another one is
            self._last_checkpoint_saved = ""  # and there is none to link to
        return False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end is to come."""
        super().on_fit_start(trainer, pl_module)
        self._ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what a guard has brought back."""
        super().on_train_end(trainer, pl_module)
        self._ended = True
        self._save_undone(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does so where Lightning had nothing left to do, and training did not end."""
        super().on_fit_end(trainer, pl_module)
        if not self._ended:
            self._save_undone(trainer)

    def _save_undone(self, trainer: Trainer) -> None:
        if any(each.undone for each in pruning_callbacks(trainer)):
            candidates = self._monitor_candidates(trainer)
            self._forget()  # what was given up
            self.best_model_path = self.format_checkpoint_name(candidates)
            self.current_score = None
            self._save_checkpoint(trainer, self.best_model_path)
            self._save_last_checkpoint(trainer, candidates)

    def _forget(self) -> None:
        self.best_k_models.clear()
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = None


class PrunedEarlyStopping(_AfterPruning, EarlyStopping):
    """An EarlyStopping that does not stop in the dip after a pruning event.

    While a PruningCallback of the Trainer has an event left, only a metric that is missing or, with
    ``check_finite``, not finite matters; the first one after the last event is the best so far. With a guard,
    metrics of a round that is not good do not count. Takes the arguments of ``EarlyStopping``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes its place after what prunes, in the Trainer's callbacks."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        last = max((callbacks.index(each) for each in pruning_callbacks(trainer)), default=0)
        if callbacks.index(self) < last:
            others = [each for each in callbacks if each is not self]
            # another list: Lightning is walking through the present one
            trainer.callbacks = [*others[:last], self, *others[last:]]  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at a metric of training steps."""
        self._look(super().on_train_epoch_end, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at a metric of validation."""
        self._look(super().on_validation_end, trainer, pl_module)

    def _look(
        self, look: Callable[[Trainer, LightningModule], None], trainer: Trainer, module: LightningModule
    ) -> None:
        if self._counts(trainer):
            look(trainer, module)
        elif any(each.events_left for each in pruning_callbacks(trainer)):
            limits = self.stopping_threshold, self.divergence_threshold, self.patience
            self.stopping_threshold = self.divergence_threshold = None
            self.patience = sys.maxsize
            try:
                look(trainer, module)
            finally:
                self.stopping_threshold, self.divergence_threshold, self.patience = limits
                self._forget()

    def _forget(self) -> None:
        self.wait_count = 0
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)


def _settled(trainer: Trainer) -> bool:
    """Whether no more will be pruned: in all processes what the first one says, as in a guard."""
    settled: bool = trainer.strategy.broadcast(all(each.settled for each in pruning_callbacks(trainer)))
    return settled
