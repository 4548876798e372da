"""Where a fit stands among its pruning events. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.moments import Unit
from lightning_prune.schedules import Event, Timetable
from lightning_prune.states import flag, record, share, whole

_SCALES = (Unit.EPOCH.value, Unit.STEP.value)
AGENDA = record(
    {"steps": whole(), "stopped": flag, "handled": record(dict.fromkeys(_SCALES, whole(-1))), "share": share},
    before={"stopped": False, "share": 1.0},  # nothing was called off, and what was handled was enough
)


class Agenda:
    """The events of one fit, and which of them are behind it.

    One is behind if one at its position was handled, and one that wanted as much: a fit that is resumed with
    another length has other events.

    Attributes:
        timetable: The events; of the present fit only, so no part of the state.
        steps: Batches that stepped so far.
        stopped: Whether the events that are left are called off.
    """

    def __init__(self) -> None:
        self.timetable = Timetable(Unit.EPOCH, ())
        self.steps = 0
        self.stopped = False
        self._handled = dict.fromkeys(_SCALES, -1)
        self._share = 0.0

    def restart(self, steps: int = 0) -> None:
        """A fit begins with no event behind it, after this many steps without pruning."""
        self.steps = steps
        self.stopped = False
        self._handled = dict.fromkeys(self._handled, -1)
        self._share = 0.0

    def due(self, epoch: int) -> Event | None:
        """The latest event that should have happened by now and has not."""
        event = None if self.stopped else self.timetable.due(self.position(epoch))
        return None if event is None or self._behind(event) else event

    def position(self, epoch: int) -> int:
        """Where the fit is, on the scale of the timetable."""
        return self._now(epoch)[self.timetable.unit.value]

    def handle(self, epoch: int, event: Event) -> None:
        """An event was done, and all before it are behind the fit, too."""
        self._handled = self._now(epoch)
        self._share = max(self._share, event.fraction)  # a longer fit's events may want less

    def reopen(self) -> None:
        """The latest event comes once more: what is to go has changed."""
        self._share = 0.0

    @property
    def over(self) -> bool:
        """Whether no event is left."""
        events = self.timetable.events
        return self.stopped or not events or self._behind(events[-1])

    def _behind(self, event: Event) -> bool:
        handled = self._handled[self.timetable.unit.value]
        return event.position <= handled and event.fraction <= self._share

    def _now(self, epoch: int) -> dict[str, int]:
        return {Unit.EPOCH.value: epoch, Unit.STEP.value: self.steps}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "steps": self.steps,
            "handled": dict(self._handled),
            "stopped": self.stopped,
            "share": self._share,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved position, as ``AGENDA`` reads it."""
        self.steps = state["steps"]
        self.stopped = state["stopped"]
        self._handled = state["handled"]
        self._share = state["share"]
