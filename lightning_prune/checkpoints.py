"""Checkpoints of the best network among those that are pruned in full."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_prune.callback import PruningCallback


class PrunedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose best is the best at the final sparsity.

    With ``monitor``, nothing counts as best while a PruningCallback of the Trainer has an event left or, with a
    guard, while its present round is not good. ``save_last`` and all else work as ever. Takes the arguments of
    ``ModelCheckpoint``.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the present network is among the best."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        settled = all(each.settled for each in callbacks if isinstance(each, PruningCallback))
        # the metric of a guard may be another one in each process
        settled = trainer.strategy.reduce_boolean_decision(settled, all=True)
        return settled and super().check_monitor_top_k(trainer, current)
