"""The queue of pruning events of a fit, or of several along one plan: which are due, which have happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.core import schema
from lightning_prune.schedules.base import Event, Timetable
from lightning_prune.schedules.moments import TimeUnit

_UNITS = (TimeUnit.EPOCH.value, TimeUnit.STEP.value)
EVENT_QUEUE = schema.record(
    {
        "steps": schema.integer(),
        "stopped": schema.boolean,
        "handled": schema.record(dict.fromkeys(_UNITS, schema.integer(-1))),
        "asked": schema.fraction,
        "given": schema.fraction,
        "trained": schema.integer(),
        "earlier": schema.record(dict.fromkeys(_UNITS, schema.integer())),
    },
    # states without these keys: nothing was cancelled, all requests were granted, and there was one fit
    before={
        "stopped": False,
        "asked": 1.0,
        "given": 1.0,
        "trained": 0,
        "earlier": dict.fromkeys(_UNITS, 0),
    },
)


class EventQueue:
    """The events of one fit, or of several that go on along one plan, and which of them have happened.

    An event counts as happened if the fit has handled an event at its position or later. The last event must
    also not request a higher share than any event so far: in a fit that is resumed with a higher target, or
    made shorter, it may have to happen again.

    Args:
        target: Share of the selector's budget that the schedule requests at its end.

    Attributes:
        timetable: The events of the current fit; not part of the state.
        steps: Number of batches so far that ended in an optimizer step, those of earlier fits included.
        stopped: Whether the remaining events are cancelled.
        trained: Number of epochs that were trained to their end, those of earlier fits included.
        earlier: Epochs and steps of the earlier fits along the plan, by unit.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self.timetable = Timetable(TimeUnit.EPOCH, ())
        self.restart()

    def restart(self, steps: int = 0) -> None:
        """Begin a fit in which no event has happened.

        Args:
            steps: Number of batches so far that ended in an optimizer step, without pruning.
        """
        self.steps = steps
        self.stopped = False
        self.trained = 0
        self.earlier = dict.fromkeys(_UNITS, 0)
        self._handled = dict.fromkeys(_UNITS, -1)
        self._asked = self._given = 0.0

    def go_on(self) -> None:
        """Begin a further fit along the same plan, where the last one has ended."""
        self.earlier = {TimeUnit.EPOCH.value: self.trained, TimeUnit.STEP.value: self.steps}

    def note_trained(self, epochs: int) -> None:
        """Record how many epochs of the present fit were trained to their end."""
        self.trained = self.earlier[TimeUnit.EPOCH.value] + epochs

    def due(self, epoch: int) -> Event | None:
        """Return the latest event up to the current position, if it has not happened; otherwise ``None``."""
        event = None if self.stopped else self.timetable.due(self.position(epoch))
        return None if event is None or self._happened(event) else event

    def position(self, epoch: int) -> int:
        """Return the current position of the fit, in the unit of the timetable."""
        return self._now(epoch)[self.timetable.unit.value]

    def mark_handled(self, epoch: int, event: Event, share: float) -> None:
        """Record that an event was handled, and with it all events before it.

        Args:
            epoch: The current epoch.
            event: The event, with the share of the target that the schedule requests.
            share: The share that was granted; a guard may grant less.
        """
        self._handled = self._now(epoch)
        # events of a longer fit may request less than earlier ones, hence the maximum
        self._asked = max(self._asked, event.fraction * self._target)
        self._given = max(self._given, share * self._target)

    def cancel(self, share: float) -> None:
        """Cancel the remaining events.

        Args:
            share: The share of the target that was reached and kept. It is not requested again.
        """
        self.stopped = True
        self._asked = self._given = share * self._target

    def resume(self, *, anew: bool) -> None:
        """Cancel no event any more, and let the last event happen again if less was granted than it requests.

        Args:
            anew: Whether to ignore what was granted so far, because other units are to be removed.
        """
        self.stopped = False
        self._asked = 0.0 if anew else min(self._asked, self._given)

    @property
    def finished(self) -> bool:
        """Whether no event remains."""
        events = self.timetable.events
        return self.stopped or not events or self._happened(events[-1])

    def _happened(self, event: Event) -> bool:
        lacking = event == self.timetable.events[-1] and event.fraction * self._target > self._asked
        return event.position <= self._handled[self.timetable.unit.value] and not lacking

    def _now(self, epoch: int) -> dict[str, int]:
        unit = TimeUnit.EPOCH.value
        return {unit: self.earlier[unit] + epoch, TimeUnit.STEP.value: self.steps}

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "steps": self.steps,
            "handled": dict(self._handled),
            "stopped": self.stopped,
            "asked": self._asked,
            "given": self._given,
            "trained": self.trained,
            "earlier": dict(self.earlier),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state, which must be as ``EVENT_QUEUE`` reads it."""
        self.steps = state["steps"]
        self.stopped = state["stopped"]
        self._handled = state["handled"]
        self._asked = state["asked"]
        self._given = state["given"]
        self.trained = state["trained"]
        self.earlier = state["earlier"]
