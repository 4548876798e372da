"""The snapshot that a Rewind restores: when it is taken, restored and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_prune.core.parts import describe
from lightning_prune.pruner import Pruner
from lightning_prune.schedules.event_queue import EventQueue
from lightning_prune.schedules.moments import TimeUnit
from lightning_prune.training.rewind import Rewind
from lightning_prune.training.snapshots import TrainingObjects, check_snapshot


class RewindState:
    """The snapshot of one fit.

    Args:
        rewind: The setting that says what to restore after an event; ``None`` if nothing is restored.

    Attributes:
        snapshot: Weights, optimizers and learning-rate schedules at the moment to restore; ``None`` before that
            moment, and once no event is left that restores it.
    """

    def __init__(self, rewind: Rewind | None) -> None:
        self._rewind = rewind
        self.snapshot: Mapping[str, Any] | None = None

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if this model cannot be rewound."""
        if self._rewind is not None:
            self._rewind.check(model)

    def take(self, training: TrainingObjects, queue: EventQueue, epoch: int, batch: int) -> None:
        """Take the snapshot, if this is its moment.

        Raises:
            ValueError: If the moment is past, and there is no snapshot of it.
        """
        if self._rewind is None or self.snapshot is not None:
            return
        (mark,), now = queue.timetable.marks, queue.position(epoch)
        begins = batch == 0 or queue.timetable.unit is TimeUnit.STEP
        if now == mark and begins:
            self.snapshot = self._rewind.take(training)
        elif now >= mark:
            earlier = "or from before that point" if self._rewind.moment.value else "begin without ckpt_path"
            raise ValueError(
                f"{self._rewind!r} cannot go back: this run was resumed after that point, from a checkpoint"
                f" without a snapshot of it. Resume from one that has it, {earlier}, or rewind to a later"
                " moment."
            )

    def go_back(self, training: TrainingObjects, pruner: Pruner) -> None:
        """Restore the snapshot, and enforce the masks in weights and optimizer state."""
        if self._rewind is None or self.snapshot is None:
            return
        self._rewind.apply_(training, self.snapshot)
        pruner.store.apply_()
        for optimizer in training.optimizers:
            pruner.store.apply_to_state_(optimizer)

    def usable(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the snapshot in a callback's state; ``None`` if it is one of other settings of the rewind."""
        snapshot: Mapping[str, Any] | None = state["snapshot"]
        return snapshot if state["settings"].get("rewind") == describe(self._rewind) else None

    def check_state(self, state: Mapping[str, Any], training: TrainingObjects, what: str) -> None:
        """Raise ValueError if the snapshot in a callback's state is not of this training."""
        if (snapshot := self.usable(state)) is not None:
            check_snapshot(snapshot, training, what)
