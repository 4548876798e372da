"""Learning-rate schedules that watch a metric, and what they take for its best value after a pruning event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_prune.training.lightning_packages import Trainer


def restart_plateaus_(trainer: Trainer, warn: Callable[[Trainer, str], None]) -> None:
    """Let the learning-rate schedules that watch a metric forget its best value, and their count of bad epochs.

    After a pruning event the metric is worse, as a rule: compared with the best value before, it would count as
    a plateau. Learning rates, and how often they were reduced, stay.

    Args:
        trainer: The Trainer of the fit, after an event.
        warn: Prints a warning, for schedules of unknown kinds.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            plateaus = _plateaus(config.scheduler)
            for each in plateaus:
                each.best = float("inf") if each.mode == "min" else -float("inf")
                each.num_bad_epochs = each.cooldown_counter = 0
            if not plateaus:
                warn(
                    trainer,
                    f"{type(config.scheduler).__name__} watches a metric, and may take the dip after a pruning"
                    " event for a plateau: a ReduceLROnPlateau, also one in an attribute, starts anew.",
                )


def _plateaus(scheduler: Any) -> list[ReduceLROnPlateau]:
    """Return a schedule, or those in its attributes, as far as it is known how they keep their best value."""
    found = (scheduler, *vars(scheduler).values())
    return [each for each in found if isinstance(each, ReduceLROnPlateau)]
