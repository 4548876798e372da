"""How much, and when: stateless functions of progress, and the events they give in one fit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lightning_prune.core.parts import Part
from lightning_prune.schedules.moments import FitLength, Grid, Moment, TimeUnit


@dataclass(frozen=True)
class Event:
    """One pruning event.

    Args:
        position: Epoch, or optimizer step, before which it happens.
        fraction: Share of the target that is to be gone after it, in [0, 1].
    """

    position: int
    fraction: float


@dataclass(frozen=True)
class Timetable:
    """The events of one fit, in order.

    Args:
        unit: What positions count: ``Unit.EPOCH`` or ``Unit.STEP``.
        events: At least one; the last has fraction 1.
        marks: Positions of further moments that were asked for.
    """

    unit: TimeUnit
    events: tuple[Event, ...]
    marks: tuple[int, ...] = ()

    def due(self, now: int) -> Event | None:
        """The latest event up to a position."""
        passed = [event for event in self.events if event.position <= now]
        return passed[-1] if passed else None


class Schedule(Part, ABC):
    """How much of the target is to be gone at a point in training.

    A schedule names moments, and maps a position among them to a share of the target. Where the
    moments fall is worked out when training starts, so the same schedule serves any length.
    """

    @property
    @abstractmethod
    def moments(self) -> tuple[Moment, ...]:
        """The moments that matter, in order: the first event and the last are among them."""

    @property
    @abstractmethod
    def interval(self) -> Moment | None:
        """How far apart further events between the first and the last moment are, if any."""

    @abstractmethod
    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """Share of the target at ``position``, not before ``anchors[0]``.

        Args:
            position: Where training is, on the scale of ``anchors``.
            anchors: Where each of ``moments`` fell, in order.

        Returns:
            A number in [0, 1] that does not fall; exactly 1 from ``anchors[-1]`` on.
        """

    def __call__(self, progress: float) -> float:
        """Share of the target at ``progress`` in [0, 1] of the fit.

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
        """The events in a fit of this length.

        Args:
            horizon: The fit.
            also: Further moments, to be marked on the same grid.

        Raises:
            ValueError: If a moment lies beyond the fit, cannot be placed, or comes after its successor.
        """
        between = [] if self.interval is None else [self.interval]
        grid = Grid.of([*self.moments, *between, *also], horizon)
        anchors = [grid.position(moment) for moment in self.moments]
        for earlier, later in zip(range(len(anchors)), range(1, len(anchors)), strict=False):
            if anchors[earlier] > anchors[later]:
                raise ValueError(
                    f"{self.moments[earlier].text} comes after {self.moments[later].text} in this fit."
                )
        positions = set(anchors)
        for moment in between:
            # below one boundary nothing can happen, so a shorter stretch is one boundary
            stretch = max(Fraction(1), grid.length_of(moment))
            count = math.ceil((anchors[-1] - anchors[0]) / stretch)
            positions |= {anchors[0] + round(index * stretch) for index in range(count)}
        return Timetable(
            grid.unit,
            tuple(
                Event(position, self.fraction(position, anchors))
                for position in sorted(positions)
                if position <= anchors[-1]
            ),
            tuple(grid.position(moment) for moment in also),
        )
