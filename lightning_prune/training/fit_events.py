"""The rounds of one fit: when pruning is due, what is rewound after it, what is undone if it costs too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune.core.parts import describe
from lightning_prune.core.schema import Reader, optional
from lightning_prune.criteria import Criterion
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.pruner import Pruner
from lightning_prune.report.history import History
from lightning_prune.schedules import Event, Schedule, Timetable
from lightning_prune.schedules.event_queue import EVENT_QUEUE, EventQueue
from lightning_prune.schedules.moments import TimeUnit
from lightning_prune.selectors import Selector
from lightning_prune.statistics.observer import Needs
from lightning_prune.training.calibration_batches import CALIBRATION_BATCHES, CalibrationBatches
from lightning_prune.training.guard import Guard
from lightning_prune.training.guard_state import GUARD_STATE, GuardState, check_good
from lightning_prune.training.rewind import Rewind
from lightning_prune.training.snapshots import SNAPSHOT, TrainingObjects, check_snapshot
from lightning_prune.training.trainer_queries import (
    check_same_masks,
    first_metric_position,
    fit_length,
    training_objects,
)

FIT_EVENTS: dict[str, Reader[Any]] = {
    "agenda": EVENT_QUEUE,
    "judge": GUARD_STATE,
    "snapshot": optional(SNAPSHOT),
    "held": CALIBRATION_BATCHES,
}
FIT_EVENTS_BEFORE: dict[str, Any] = {
    "judge": {},
    "snapshot": None,
    "held": (),
}  # there was no more than the agenda
_LOST = (
    ". Checkpoints from before hold what was given up: call trainer.save_checkpoint(path), or use a"
    " PrunedCheckpoint, which saves what came back."
)


class FitEvents:
    """Prunes when that is due; rewinds and judges, if that is wanted.

    Args:
        target: Share of all units that is to be gone at the end.
        criterion: How much a unit matters.
        selector: Which units go.
        schedule: How much, and when.
        rewind: Where weights go after an event.
        guard: What an event may cost.

    Attributes:
        agenda: Where the fit stands among its events.
        undone: Whether the last round of this fit was undone when it ended.
    """

    def __init__(
        self,
        target: float | None,
        criterion: Criterion,
        selector: Selector,
        schedule: Schedule,
        rewind: Rewind | None,
        guard: Guard | None,
    ) -> None:
        self._parts = f"{criterion!r} with {selector!r}"
        self._needs = criterion.needs | selector.needs
        self._wanted = max(criterion.held, selector.held)
        self._schedule = schedule
        self._rewind = rewind
        self._guard = guard
        self.queue = EventQueue(selector.resolve(target))
        self.undone = False
        self._guard_state = GuardState()
        self._snapshot: Mapping[str, Any] | None = None
        self._held = CalibrationBatches(self._wanted)
        self._said: set[str] = set()

    # --- a fit begins

    def restart(self, steps: int) -> None:
        """A fit begins with no event behind it, after this many steps without pruning."""
        self.queue.restart(steps)
        self._guard_state = GuardState()
        self._snapshot = None
        self._held = CalibrationBatches(self._wanted)

    def begin_fit(self, trainer: Trainer) -> None:
        """Works out when events are due.

        Raises:
            ValueError: If a moment does not fit into the training, or to what is to happen then.
        """
        self._said = set()
        self.undone = False
        try:
            timetable = self._timetable(trainer)
        except ValueError as error:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise
            rank_zero_info(f"fast_dev_run is too short to prune: {error}")
            self.queue.timetable = Timetable(TimeUnit.STEP, ())
            return
        self.queue.timetable = timetable
        wanted = {(moment.unit, moment.value) for moment in self._schedule.moments}
        if len(timetable.events) < min(2, len(wanted)):
            rank_zero_warn(
                f"{self._schedule!r} prunes all at once: in this fit its moments fall together."
                ' Moments in steps, such as "100st", need no epoch to begin.'
            )

    def _timetable(self, trainer: Trainer) -> Timetable:
        also = [] if self._rewind is None else [self._rewind.moment]
        timetable = self._schedule.timetable(fit_length(trainer), also)
        first = next(event for event in timetable.events if event.fraction > 0)
        if first.position == 0 and self._needs:
            raise ValueError(
                f"{self._schedule!r} prunes before the first batch, when {self._parts} has seen no training"
                " step: start later, or choose a criterion that looks at weights."
            )
        if self._guard is not None and first.position < first_metric_position(trainer, timetable.unit):
            raise ValueError(
                f"{self._schedule!r} prunes before {self._guard!r} can have seen a metric of the dense network:"
                " start later."
            )
        if any(mark > first.position for mark in timetable.marks):
            raise ValueError(
                f"{self._rewind!r} is later in this fit than the first event of {self._schedule!r}: rewind to"
                " an earlier point, or prune later."
            )
        return timetable

    def check(self, module: LightningModule) -> None:
        """Raises ValueError if this model cannot be rewound as it should."""
        if self._rewind is not None and not self.queue.over:
            self._rewind.check(module)

    def check_logged(self, trainer: Trainer) -> None:
        """Raises ValueError if a validation that has just run did not log the guard's metric."""
        metrics = trainer.callback_metrics  # some modules log nothing in a sanity check
        if self._guard is not None and metrics and self._guard.monitor not in metrics:
            raise ValueError(
                f"monitor={self._guard.monitor!r} must be one that validation logs: {_names(metrics)}."
            )

    # --- on the way

    def advance(
        self, trainer: Trainer, module: LightningModule, pruner: Pruner, history: History, batch: int = 0
    ) -> bool:
        """Does what is due before a batch, or at the start of an epoch.

        Args:
            trainer: The module's.
            module: Is pruned.
            pruner: Prunes it.
            history: Of the fit so far.
            batch: Number of the batch in its epoch.

        Returns:
            Whether masks were decided about.

        Raises:
            ValueError: If the point to rewind to is past, or the guard's metric was never measured.
            RuntimeError: If the processes do not hold the same masks afterwards.
        """
        if self.queue.over:
            return False
        epoch = trainer.current_epoch
        training = training_objects(trainer, module)
        self._take_snapshot(training, epoch, batch)
        event = self.queue.due(epoch)
        if event is None:
            return False
        losses = self._held.losses(trainer)
        unseen = pruner.unseen
        if event.fraction > 0 and not (pruner.ready and (losses or Needs.LOSS not in self._needs)):
            hint = "" if module.automatic_optimization else " By hand, steps are those of self.optimizers()."
            self._warn_once(trainer, f"A pruning event waits: {self._parts} has seen no finite step yet.{hint}")
            return False
        fraction = self._allowed(event, trainer, training, pruner, history)
        if fraction is not None:
            pruner.prune(fraction, *training.optimizers, losses=losses)
            self.queue.handle(epoch, event, fraction)
            self._guard_state.reached = max(
                self._guard_state.reached, fraction
            )  # a longer fit's events may want less
            self._go_back(training, pruner, fraction)
            # what is frozen may yet thaw
            left = [name for name, trains in unseen.items() if trains or self.queue.over]
            if left and fraction > 0:
                self._warn_once(
                    trainer,
                    f"A pruning event left {', '.join(left)} alone, and took its share of the rest:"
                    f" {self._parts} has seen no finite step of them since the last one.",
                )
        if self.queue.over:
            self._held.clear()
        check_same_masks(trainer, pruner.store)
        return True

    def hold(self, trainer: Trainer, module: LightningModule, pruner: Pruner, batch: Any) -> None:
        """Keeps a batch for what asks for the loss, if any does and an event is left."""
        if not self.queue.over:
            self._held.hold(trainer, module, pruner, batch)

    def _take_snapshot(self, training: TrainingObjects, epoch: int, batch: int) -> None:
        """Takes the snapshot to rewind to, at its moment; a fit made longer once all is gone needs none."""
        if self._rewind is None or self._snapshot is not None or self._guard_state.reached == 1:
            return
        (mark,), now = self.queue.timetable.marks, self.queue.position(epoch)
        begins = batch == 0 or self.queue.timetable.unit is TimeUnit.STEP
        if now == mark and begins:
            self._snapshot = self._rewind.take(training)
        elif now >= mark:
            raise ValueError(
                f"{self._rewind!r} cannot go back: this run was resumed after that point, from a checkpoint"
                " without a snapshot of it. Resume from one that has it, or from before that point."
            )

    def _go_back(self, training: TrainingObjects, pruner: Pruner, fraction: float) -> None:
        """Rewinds what is left after an event that removed something."""
        if self._rewind is None or self._snapshot is None or fraction == 0:
            return
        self._rewind.apply_(training, self._snapshot)
        pruner.store.apply_()
        for optimizer in training.optimizers:
            pruner.store.apply_to_state_(optimizer)
        if self._guard_state.reached == 1:  # a guard may have left something for a longer fit
            self._snapshot = None

    def _allowed(
        self, event: Event, trainer: Trainer, training: TrainingObjects, pruner: Pruner, history: History
    ) -> float | None:
        """The share of the target that an event may take; ``None`` if it is called off."""
        if self._guard is None or event.fraction == 0:
            return event.fraction
        if not self._guard_state.running:
            dense = trainer.strategy.broadcast(history.reference)
            if dense is not None:
                self._guard_state.begin(dense, training, pruner)
            elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise ValueError(
                    f"monitor={self._guard.monitor!r} was not measured before the first pruning event: start"
                    f" later, or take one that is logged by then: {_names(trainer.callback_metrics)}."
                )
            return event.fraction
        return self._judged(trainer, training, pruner, history, event.fraction)

    def _judged(
        self,
        trainer: Trainer,
        training: TrainingObjects,
        pruner: Pruner,
        history: History,
        wanted: float | None,
    ) -> float | None:
        """What the guard leaves of the wanted share; ``None`` if the network went back."""
        assert self._guard is not None
        metric = trainer.strategy.broadcast(history.measured)
        if metric is None and self._guard.monitor not in trainer.callback_metrics and trainer.callback_metrics:
            raise ValueError(
                f"monitor={self._guard.monitor!r} is not logged: {_names(trainer.callback_metrics)}."
            )
        if metric is None or not self._guard_state.informed:
            self._warn_once(
                trainer, f"A round cannot be judged: no {self._guard.monitor} to compare was measured in it."
            )
            return wanted
        place = f"epoch {trainer.current_epoch}"
        fraction = self._guard_state.judge(self._guard, place, metric, wanted, training, pruner)
        say = rank_zero_warn if self._guard_state.bad else rank_zero_info
        lost = wanted is None and not self._guard_state.running
        say(self._guard_state.decisions[-1] + (_LOST if lost else ""))
        if not self._guard_state.running:
            self.queue.call_off(self._guard_state.reached)
            self._snapshot = None
        return fraction

    def _warn_once(self, trainer: Trainer, text: str) -> None:
        if text not in self._said:
            say = rank_zero_info if trainer.fast_dev_run else rank_zero_warn  # type: ignore[attr-defined]
            say(text)
            self._said.add(text)

    # --- the fit ends

    def finish(self, trainer: Trainer, module: LightningModule, pruner: Pruner, history: History) -> bool:
        """Judges the last round.

        Returns:
            Whether the network went back to an earlier one.
        """
        if self._guard is None or not self._guard_state.running:
            return False
        self._judged(trainer, training_objects(trainer, module), pruner, history, None)
        if self.queue.over:
            self._guard_state.end()
        self.undone = self.queue.stopped
        return self.undone

    def good(self, history: History) -> bool:
        """Whether the present round is, by the guard, if it is judged at all."""
        if self._guard is None or not self._guard_state.running:
            return True
        return self._guard_state.good(self._guard, history.measured)

    # --- state

    @property
    def decisions(self) -> tuple[str, ...]:
        """What the guard has decided, in words."""
        return tuple(self._guard_state.decisions)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "agenda": self.queue.state_dict(),
            "judge": self._guard_state.state_dict(),
            "snapshot": self._snapshot,
            **self._held.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state of the whole callback, its part as ``ROUNDS`` reads it."""
        self.queue.load_state_dict(state["agenda"])
        self._held.load_state_dict(state)
        self._guard_state.load_state_dict(state["judge"])
        if state["settings"].get("guard") != describe(self._guard):
            self.queue.resume(anew=False)  # another rule has called it off, if one did
        if self._guard is None:
            self._guard_state.end()
        elif state["monitor"] != self._guard.monitor:
            self._guard_state.forget_metric()
        self._snapshot = self._usable(state)

    def resume(self, *, anew: bool) -> None:
        """What is to go has changed: nothing is called off, and no share of it is reached.

        Args:
            anew: Whether other units are to go, so that the last event comes once more if it is behind.
        """
        self.queue.resume(anew=anew)
        self._guard_state.reached = 0.0

    def check_state(self, state: Mapping[str, Any], training: TrainingObjects) -> None:
        """Makes sure that what a saved state would bring back is of this training.

        Raises:
            ValueError: If not.
        """
        if (snapshot := self._usable(state)) is not None:
            check_snapshot(snapshot, training, f"{PRUNING_STATE}, snapshot")
        if self._guard is not None and (good := state["judge"]["good"]) is not None:
            check_good(good, training, f"{PRUNING_STATE}, judge.good")

    def _usable(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The snapshot of a saved state; another rewind would go back to another point."""
        snapshot: Mapping[str, Any] | None = state["snapshot"]
        return snapshot if state["settings"].get("rewind") == describe(self._rewind) else None


def _names(metrics: Mapping[str, Any]) -> str:
    return ", ".join(sorted(metrics)) or "nothing is"
