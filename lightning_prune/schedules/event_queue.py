"""Where a fit stands among its pruning events."""

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
    },
    before={"stopped": False, "asked": 1.0, "given": 1.0},  # nothing was called off, and all was enough
)


class EventQueue:
    """The events of one fit, and which of them are behind it.

    An event is behind if the fit has handled one at its position or later. The last one also must not ask
    for more than was ever asked for: a fit that is resumed with a higher target, or made shorter, may lack
    something.

    Args:
        target: Share of all that the whole schedule asks for.

    Attributes:
        timetable: The events; of the present fit only, so no part of the state.
        steps: Batches that stepped so far.
        stopped: Whether the events that are left are called off.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self.timetable = Timetable(TimeUnit.EPOCH, ())
        self.steps = 0
        self.stopped = False
        self._handled = dict.fromkeys(_UNITS, -1)
        self._asked = self._given = 0.0

    def restart(self, steps: int = 0) -> None:
        """A fit begins with no event behind it, after this many steps without pruning."""
        self.steps = steps
        self.stopped = False
        self._handled = dict.fromkeys(self._handled, -1)
        self._asked = self._given = 0.0

    def due(self, epoch: int) -> Event | None:
        """The latest event that should have happened by now and has not."""
        event = None if self.stopped else self.timetable.due(self.position(epoch))
        return None if event is None or self._behind(event) else event

    def position(self, epoch: int) -> int:
        """Where the fit is, on the scale of the timetable."""
        return self._now(epoch)[self.timetable.unit.value]

    def handle(self, epoch: int, event: Event, share: float) -> None:
        """An event was done, and all before it are behind the fit, too.

        Args:
            epoch: The present one.
            event: What the schedule asked for.
            share: What it was given; a guard may give less.
        """
        self._handled = self._now(epoch)
        self._asked = max(self._asked, event.fraction * self._target)  # a longer fit's events may ask for less
        self._given = max(self._given, share * self._target)

    def call_off(self, share: float) -> None:
        """No event follows: this share of the target is what was good."""
        self.stopped = True
        self._asked = self._given = share * self._target

    def resume(self, *, anew: bool) -> None:
        """Nothing is called off any more, and what was asked for and not given is lacking.

        Args:
            anew: Whether what was given counts for nothing, as other units are to go.
        """
        self.stopped = False
        self._asked = 0.0 if anew else min(self._asked, self._given)

    @property
    def over(self) -> bool:
        """Whether no event is left."""
        events = self.timetable.events
        return self.stopped or not events or self._behind(events[-1])

    def _behind(self, event: Event) -> bool:
        lacking = event == self.timetable.events[-1] and event.fraction * self._target > self._asked
        return event.position <= self._handled[self.timetable.unit.value] and not lacking

    def _now(self, epoch: int) -> dict[str, int]:
        return {TimeUnit.EPOCH.value: epoch, TimeUnit.STEP.value: self.steps}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "steps": self.steps,
            "handled": dict(self._handled),
            "stopped": self.stopped,
            "asked": self._asked,
            "given": self._given,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved position, as ``AGENDA`` reads it."""
        self.steps = state["steps"]
        self.stopped = state["stopped"]
        self._handled = state["handled"]
        self._asked = state["asked"]
        self._given = state["given"]
