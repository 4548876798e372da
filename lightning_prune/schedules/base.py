"""The base class of schedules, and the timetable of pruning events that a schedule gives for one fit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from lightning_prune.core.parts import Part
from lightning_prune.schedules.moments import FitLength, Grid, Moment, TimeUnit


@dataclass(frozen=True)
class Event:
    """One pruning event.

    Args:
        position: The epoch, or optimizer step, before which it happens.
        fraction: Share of the target that is removed after it, in [0, 1].
    """

    position: int
    fraction: float


@dataclass(frozen=True)
class Timetable:
    """The events of one fit, in order.

    Args:
        unit: What positions count: ``TimeUnit.EPOCH`` or ``TimeUnit.STEP``.
        events: At least one; the last has fraction 1.
        marks: Positions of further moments that the caller asked for.
    """

    unit: TimeUnit
    events: tuple[Event, ...]
    marks: tuple[int, ...] = ()

    def due(self, now: int) -> Event | None:
        """Return the latest event at or before position ``now``; ``None`` if there is none."""
        passed = [event for event in self.events if event.position <= now]
        return passed[-1] if passed else None


class Schedule(Part, ABC):
    """The share of the target that is removed at each point in training.

    A schedule names moments, and maps a position among them to a share of the target. The positions of the
    moments are computed when training starts, so the same schedule works for a fit of any length.
    """

    @property
    @abstractmethod
    def moments(self) -> tuple[Moment, ...]:
        """The moments that define the schedule, in order, from the first event to the last."""

    @property
    def interval(self) -> Moment | None:
        """The time between further events from the first moment to the last; by default there are none."""
        return None

    @abstractmethod
    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """Return the share of the target at ``position``, which is not before ``anchors[0]``.

        Args:
            position: A position in training, on the scale of ``anchors``.
            anchors: The position of each of ``moments``, in order.

        Returns:
            A number in [0, 1] that does not decrease with ``position``; exactly 1 from ``anchors[-1]`` on.
        """

    def __call__(self, progress: float) -> float:
        """Return the share of the target at ``progress`` in [0, 1] of the fit.

        Raises:
            ValueError: If ``progress`` is outside [0, 1], or a moment is no share of the fit.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress!r} must lie in [0, 1].")
        for moment in self.moments:
            if moment.unit is not TimeUnit.FIT and moment.value != 0:
                raise ValueError(f'{moment.text} has no meaning without a Trainer: give a share such as "30%".')
        anchors = [float(moment.value) for moment in self.moments]
        if progress < anchors[0]:
            return 0.0
        return 1.0 if progress == 1 else self.fraction(progress, anchors)

    def timetable(self, horizon: FitLength, also: Sequence[Moment] = ()) -> Timetable:
        """Return the events in a fit of this length.

        Args:
            horizon: The length of the fit.
            also: Further moments whose positions to return as ``marks``.

        Raises:
            ValueError: If a moment lies beyond the fit, cannot be placed, or comes after its successor.
        """
        between = [] if self.interval is None else [self.interval]
        grid = Grid.of([*self.moments, *between, *also], horizon)
        anchors = [grid.position(moment) for moment in self.moments]
        placed = zip(anchors, self.moments, strict=True)
        for (earlier, moment), (later, successor) in pairwise(placed):
            if earlier > later:
                raise ValueError(f"{moment.text} comes after {successor.text} in this fit.")
        positions = set(anchors)
        for interval in between:
            # events happen at whole positions, so an interval below 1 is made 1
            length = max(Fraction(1), grid.length_of(interval))
            count = math.ceil((anchors[-1] - anchors[0]) / length)
            positions |= {anchors[0] + round(index * length) for index in range(count)}
        events = tuple(Event(position, self.fraction(position, anchors)) for position in sorted(positions))
        return Timetable(grid.unit, events, tuple(grid.position(moment) for moment in also))
