"""The pruning events of one fit: when one is due, how much it may remove, and the rewind after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_prune.core import schema
from lightning_prune.core.parts import describe
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.pruner import Pruner
from lightning_prune.report.history import History
from lightning_prune.schedules.base import Timetable
from lightning_prune.schedules.event_queue import EVENT_QUEUE, EventQueue
from lightning_prune.schedules.moments import FitLength, TimeUnit, parse_horizon
from lightning_prune.statistics.observer import Needs
from lightning_prune.training import trainer_queries
from lightning_prune.training.calibration_batches import CALIBRATION_BATCHES, CalibrationBatches
from lightning_prune.training.guard_state import GUARD_STATE, GuardState
from lightning_prune.training.lightning_packages import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_prune.training.parts import PruningParts
from lightning_prune.training.plateaus import restart_plateaus_
from lightning_prune.training.rewind_state import RewindState
from lightning_prune.training.snapshots import SNAPSHOT, TrainingObjects

FIT_EVENTS: dict[str, schema.Reader[Any]] = {
    "agenda": EVENT_QUEUE,
    "judge": GUARD_STATE,
    "snapshot": schema.optional(SNAPSHOT),
    "held": CALIBRATION_BATCHES,
}
FIT_EVENTS_BEFORE: dict[str, Any] = {"judge": {}, "snapshot": None, "held": ()}  # the first states lack them


class FitEvents:
    """Prunes when an event is due, and carries out the callback's rewind and guard, if it has them.

    Args:
        parts: The arguments of the callback.

    Attributes:
        queue: The events, and which of them have happened.
        guard_state: The dense metric, the last good network, and the guard's decisions.
        undone: Whether the last round of this fit was undone when it ended.
    """

    def __init__(self, parts: PruningParts) -> None:
        criterion, selector = parts.criterion, parts.selector
        self._method = f"{criterion!r} with {selector!r}"
        self._needs = criterion.needs | selector.needs
        self._observing: dict[str, str] = {}  # part that needs training steps, to what does without
        if criterion.needs:
            self._observing[repr(criterion)] = "a criterion that looks at weights"
        if selector.needs:
            self._observing[repr(selector)] = "a selector that goes by scores"
        self._schedule, self._rewind, self._guard = parts.schedule, parts.rewind, parts.guard
        self._horizon = parse_horizon(parts.horizon)
        self._reconstruct = parts.reconstruct
        reconstructed = 0 if parts.reconstruct is None else parts.reconstruct.batches
        self._batch_count = max(criterion.held, selector.held, reconstructed)
        self._warn = trainer_queries.WarnOnce()
        self._shares = parts.shares()
        self.queue = EventQueue(max(self._shares.values(), default=0.0))
        self.undone = False
        self._reset()

    def _reset(self) -> None:
        self.guard_state = GuardState(self._guard, self._warn)
        self._rewind_state = RewindState(self._rewind)
        self._batches = CalibrationBatches(
            self._batch_count,
            losses=Needs.LOSS in self._needs,
            passes=self._reconstruct is not None or Needs.CALIBRATION in self._needs,
        )

    # --- a fit begins

    def restart(self, steps: int) -> None:
        """Begin a fit in which no event has happened, after this many steps without pruning."""
        self.queue.restart(steps)
        self._reset()

    def begin_fit(self, trainer: Trainer) -> None:
        """Compute when events are due.

        Raises:
            ValueError: If a moment does not fit into the training, or comes before criterion, guard or rewind
                can work.
        """
        self._warn.clear()
        self.undone = False
        if not self._shares:  # nothing is removed but given masks
            for part in filter(None, (self._rewind, self._guard, self._reconstruct)):
                raise ValueError(f"{part!r} follows pruning events, and without a target there are none.")
            return
        try:
            self.queue.timetable = self._timetable(trainer)
        except ValueError as error:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise
            rank_zero_info(f"fast_dev_run is too short to prune: {error}")
            self.queue.timetable = Timetable(TimeUnit.STEP, ())
            return
        moments = {(moment.unit, moment.value) for moment in self._schedule.moments}
        removing = [event for event in self.queue.timetable.events if event.fraction > 0]
        if len(removing) < min(2, len(moments)):
            self._warn(
                trainer,
                f"{self._schedule!r} prunes all at once in this fit: for more events let it take more epochs,"
                ' or give all its moments in steps, such as "100st" (start, end and every=).',
            )

    def _timetable(self, trainer: Trainer) -> Timetable:
        also = [] if self._rewind is None else [self._rewind.moment]
        length = trainer_queries.fit_length(trainer).of_plan(self._horizon)
        timetable = self._schedule.timetable(length, also)
        first = next(event for event in timetable.events if event.fraction > 0)
        if first.position == 0 and self._needs:
            raise ValueError(
                f"{self._schedule!r} prunes before the first batch, when {' and '.join(self._observing)} cannot"
                f" have seen a training step: start later, or choose {' and '.join(self._observing.values())}."
            )
        if first.position == 0 and self._reconstruct is not None:
            raise ValueError(
                f"{self._schedule!r} prunes before the first batch, when {self._reconstruct!r} has seen none:"
                " start later."
            )
        earliest = trainer_queries.first_metric_position(trainer, timetable.unit)
        if self._guard is not None and first.position < earliest:
            raise ValueError(
                f"{self._schedule!r} prunes before {self._guard!r} can have seen a metric of the dense network:"
                f" {_later(earliest, timetable.unit, length)}."
            )
        if any(mark > first.position for mark in timetable.marks):
            raise ValueError(
                f"{self._rewind!r} is later in this fit than the first event of {self._schedule!r}: rewind to"
                " an earlier point, or prune later."
            )
        return timetable

    def check(self, module: LightningModule) -> None:
        """Raise ValueError if this model cannot be rewound, and an event is left."""
        if not self.queue.finished:
            self._rewind_state.check(module)

    # --- events

    def advance(
        self,
        trainer: Trainer,
        module: LightningModule,
        pruner: Pruner,
        history: History,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
        batch: int = 0,
    ) -> bool:
        """Take a snapshot or prune, if that is due before a batch or at the start of an epoch.

        Args:
            trainer: The Trainer of the fit.
            module: The module that is pruned.
            pruner: The pruner of the module.
            history: The history of the fit so far.
            whole: Returns a context in which a module that is cut has its dense shapes. When it ends, the
                module is cut to what the masks have left.
            batch: Number of the batch in its epoch.

        Returns:
            Whether masks may have changed.

        Raises:
            ValueError: If the point to rewind to is past, or the guard's metric was never measured.
            RuntimeError: If the processes do not hold the same masks afterwards.
        """
        if self.queue.finished:
            return False
        epoch = trainer.current_epoch
        training = trainer_queries.training_objects(trainer, module)
        if self.guard_state.reached < 1:  # a fit made longer once all is removed rewinds no more
            self._rewind_state.take(training, self.queue, epoch, batch)
        event = self.queue.due(epoch)
        if event is None:
            return False
        losses = self._batches.losses(trainer)
        if event.fraction > 0 and (self._batches.missing or not pruner.ready):
            unseen = not module.automatic_optimization and pruner.observations.left_out == 0
            hint = trainer_queries.BY_HAND if unseen else ""
            self._warn(trainer, f"A pruning event waits: {self._method} has seen no finite step yet.{hint}")
            return False
        unobserved = pruner.observations.unobserved
        fraction = self.guard_state.allowed(event.fraction, trainer, training, pruner, history)
        if fraction is None:
            self._call_off()
        else:
            if fraction > 0:  # an event that removes nothing runs no passes
                with whole():
                    pruner.prune(
                        fraction,
                        *training.optimizers,
                        losses=losses,
                        reconstruct=self._reconstruct,
                        batches=self._batches.calibration(trainer, module) or (),
                    )
            self.queue.mark_handled(epoch, event, fraction)
            # events of a longer fit may ask for less
            self.guard_state.reached = max(self.guard_state.reached, fraction)
            if fraction > 0:
                restart_plateaus_(trainer, self._warn)  # a rewind brings their earlier state back
                self._rewind_state.go_back(training, pruner)
                if self.guard_state.reached == 1:  # a guard may have left something for a longer fit
                    self._rewind_state.snapshot = None
                self._warn_of_unobserved(trainer, unobserved)
        if self.queue.finished:
            self._batches.clear()
        trainer_queries.check_same_masks(trainer, pruner.store)
        return True

    def _warn_of_unobserved(self, trainer: Trainer, unobserved: Mapping[str, bool]) -> None:
        # frozen groups may still be unfrozen before the last event
        left = [name for name, trains in unobserved.items() if trains or self.queue.finished]
        if left:
            self._warn(
                trainer,
                f"A pruning event left {', '.join(left)} alone, and took its share of the rest:"
                f" {self._method} has seen no finite step of them since the last one.",
            )

    def _call_off(self) -> None:
        """Cancel the events that are left: the guard has restored the last good network."""
        self.queue.cancel(self.guard_state.reached)
        self._rewind_state.snapshot = None

    def add_batch(self, trainer: Trainer, module: LightningModule, pruner: Pruner, batch: Any) -> None:
        """Keep a calibration batch, if a part needs one and an event is left."""
        if not self.queue.finished:
            self._batches.add_batch(trainer, module, pruner, batch)

    # --- the fit ends

    @property
    def to_be_continued(self) -> bool:
        """Whether events are left for a further fit along the same plan."""
        return self._horizon is not None and not self.queue.finished

    def finish(self, trainer: Trainer, module: LightningModule, pruner: Pruner, history: History) -> bool:
        """End the last round, unless a further fit goes on with it: compare its metric with the guard.

        Returns:
            Whether the guard restored an earlier network.
        """
        if self.to_be_continued:
            return False
        self.undone = self.guard_state.finish(
            trainer, trainer_queries.training_objects(trainer, module), pruner, history
        )
        if self.undone:
            self._call_off()
        if self.queue.finished:
            self.guard_state.end()
        return self.undone

    def tell_of_those_left(self, trainer: Trainer, module: LightningModule) -> None:
        """Warn of events that have not happened, unless a further fit goes on with them."""
        if self._horizon is not None and not self.queue.finished:
            rank_zero_info(f"Pruning goes on in a further fit: {self._horizon.text} has events left.")
        elif not self.queue.finished:
            why = trainer_queries.why_unfinished(trainer, module)
            rank_zero_warn("The fit ended before the last pruning event: the target is not reached." + why)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "agenda": self.queue.state_dict(),
            "judge": self.guard_state.state_dict(),
            "snapshot": self._rewind_state.snapshot,
            **self._batches.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state of the whole callback, whose entries for events ``FIT_EVENTS`` reads."""
        self.queue.load_state_dict(state["agenda"])
        self._batches.load_state_dict(state)
        self.guard_state.load_state_dict(state["judge"], state["monitor"])
        if state["settings"].get("guard") != describe(self._guard):
            self.queue.resume(anew=False)  # if events were cancelled, it was by another guard
        self._rewind_state.snapshot = self._rewind_state.usable(state)

    def resume(self, *, anew: bool) -> None:
        """Cancel no event, and count no share as reached: the settings of what is removed have changed.

        Args:
            anew: Whether other units are to be removed, so that the last event happens again if it has
                happened.
        """
        self.queue.resume(anew=anew)
        self.guard_state.reached = 0.0

    def check_state(self, state: Mapping[str, Any], training: TrainingObjects) -> None:
        """Raise ValueError if the weights and optimizer states in a saved state are not of this training."""
        self._rewind_state.check_state(state, training, f"{PRUNING_STATE}, snapshot")
        self.guard_state.check_state(state["judge"], training, f"{PRUNING_STATE}, judge.good")


def _later(position: int, unit: TimeUnit, length: FitLength) -> str:
    """Return what to do where the first event comes before a position, which may be the end of the fit."""
    if unit is TimeUnit.STEP and length.steps_per_epoch is None:
        return "start later"  # no position of a validation is known
    end = length.length if unit is TimeUnit.STEP else length.epochs_begun
    if end is None or position < end:
        return f'start at "{position}{unit.value}" or later'
    return "validate within the epoch (val_check_interval), or train for more than an epoch"
