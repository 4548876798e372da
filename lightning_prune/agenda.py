"""Where a fit stands among its pruning events. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.moments import Unit
from lightning_prune.schedules import Event, Timetable
from lightning_prune.states import flag, record, whole

_SCALES = (Unit.EPOCH.value, Unit.STEP.value)
AGENDA = record(
    {"steps": whole(), "stopped": flag, "handled": record(dict.fromkeys(_SCALES, whole(-1)))},
    before={"stopped": False},  # nothing was called off
)


class Agenda:
    """The events of one fit, and which of them are behind it.

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

    def restart(self, steps: int = 0) -> None:
        """A fit begins with no event behind it, after this many steps without pruning."""
        self.steps = steps
        self.stopped = False
        self._handled = dict.fromkeys(self._handled, -1)

    def due(self, epoch: int) -> Event | None:
        """The latest event that should have happened by now and has not."""
        if self.stopped:
            return None
        return self.timetable.due(self._handled[self.timetable.unit.value], self.position(epoch))

    def position(self, epoch: int) -> int:
        """Where the fit is, on the scale of the timetable."""
        return self._now(epoch)[self.timetable.unit.value]

    def handle(self, epoch: int) -> None:
        """All events up to now are behind the fit."""
        self._handled = self._now(epoch)

    @property
    def over(self) -> bool:
        """Whether no event is left."""
        events = self.timetable.events
        done = not events or events[-1].position <= self._handled[self.timetable.unit.value]
        return self.stopped or done

    def _now(self, epoch: int) -> dict[str, int]:
        return {Unit.EPOCH.value: epoch, Unit.STEP.value: self.steps}

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"steps": self.steps, "handled": dict(self._handled), "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved position, as ``AGENDA`` reads it."""
        self.steps = state["steps"]
        self.stopped = state["stopped"]
        self._handled = state["handled"]
