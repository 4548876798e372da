"""Lightning's hooks of a callback, each of which the present run of the Trainer handles."""

from __future__ import annotations

from typing import Any, cast

from torch.optim import Optimizer

from lightning_prune.callbacks.fit import PruningFit
from lightning_prune.training.lightning_packages import Callback, LightningModule, Trainer


class FitHooks(Callback):
    """Forwards Lightning's hooks to the present run, which the callback sets in ``setup``."""

    _fit: PruningFit | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute when events are due, and bind a loaded state to the module unless that needs a batch."""
        self._run.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last round."""
        self._run.end_training()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compact the network if ``compact=True``, then write the report: checkpoints are saved by now."""
        self._run.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Enforce the masks and remove all hooks after an error or Ctrl-C."""
        if self._fit is not None:
            self._fit.interrupt()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks, however the run ended."""
        if self._fit is not None:
            self._fit.release()

    @property
    def _run(self) -> PruningFit:
        return cast(PruningFit, self._fit)

    # --- epochs, steps and validations

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune after the last epoch's checkpoint: its metric was measured on the weights that it holds."""
        self._run.begin_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune before a batch, if a moment is in steps, and observe the activations of its step."""
        self._run.begin_batch(batch, batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe gradients under manual optimization."""
        self._run.after_backward()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Observe gradients, which are unscaled and not clipped yet."""
        self._run.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step and log the sparsity."""
        self._run.end_batch(batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the monitored metric, to tell whether this validation logs it."""
        self._run.begin_validation()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch of each loader in the sanity check, to follow ``validation_step`` on it."""
        self._run.begin_validation_batch(batch, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the monitored metric, if this validation logged it."""
        self._run.end_validation()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the monitored metric, if training steps logged it."""
        self._run.end_training_epoch()
