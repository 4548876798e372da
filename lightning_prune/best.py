"""Callbacks that judge a network only once it is pruned in full: which is the best, and when to stop."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_prune.callback import PruningCallback


class PrunedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose best is the best at the final sparsity.

    With ``monitor``, nothing counts as best while a PruningCallback of the Trainer has an event left or, with a
    guard, while its present round is not good; ``save_last`` saves all the same. Where a guard undoes the last
    round when the fit ends, what came back is saved then, and is the best. Takes the arguments of
    ``ModelCheckpoint``.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the present network is among the best."""
        if _settled(trainer):
            return super().check_monitor_top_k(trainer, current)
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # it is saved only where another one is
        return False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what a guard has brought back."""
        super().on_train_end(trainer, pl_module)
        if any(each.undone for each in _pruning(trainer)):
            candidates = self._monitor_candidates(trainer)
            self.best_k_models.clear()  # they hold what was given up
            self.best_model_path = self.format_checkpoint_name(candidates)
            self.best_model_score = self.current_score = None
            trainer.save_checkpoint(self.best_model_path, self.save_weights_only)
            self._save_last_checkpoint(trainer, candidates)


class PrunedEarlyStopping(EarlyStopping):
    """An EarlyStopping that does not stop in the dip after a pruning event.

    While a PruningCallback of the Trainer has an event left or, with a guard, while its present round is not
    good, it takes no notice of the metric; then the first one counts as the best so far. Takes the arguments
    of ``EarlyStopping``.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at a metric of training steps."""
        if _settled(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at a metric of validation."""
        if _settled(trainer):
            super().on_validation_end(trainer, pl_module)


def _settled(trainer: Trainer) -> bool:
    """Whether no more will be pruned, in any process: the metric of a guard may be another one in each."""
    settled = all(each.settled for each in _pruning(trainer))
    return trainer.strategy.reduce_boolean_decision(settled, all=True)


def _pruning(trainer: Trainer) -> list[PruningCallback]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, PruningCallback)]
