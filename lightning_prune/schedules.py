"""How much, and when: stateless functions of progress, and the events they give in one fit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from lightning_prune.moments import Grid, Horizon, Moment, Unit
from lightning_prune.parts import Part, is_number


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

    unit: Unit
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
            if moment.unit is not Unit.FIT and moment.value != 0:
                raise ValueError(f'{moment.text} has no meaning without a Trainer: give a share such as "30%".')
        anchors = [float(moment.value) for moment in self.moments]
        if progress < anchors[0]:
            return 0.0
        return 1.0 if progress == 1 else self.fraction(progress, anchors)

    def timetable(self, horizon: Horizon, also: Sequence[Moment] = ()) -> Timetable:
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


@dataclass(frozen=True, repr=False)
class Ramp(Schedule, ABC):
    """From nothing at ``start`` to the whole target at ``end``, in events ``every`` so often.

    Args:
        start: The first event.
        end: The last event, which always happens.
        every: The time between events. Without a Trainer it has no meaning: the caller decides.

    Raises:
        ValueError: If a moment does not parse, or ``start`` comes after ``end``.
    """

    start: str | float = "10%"
    end: str | float = "70%"
    every: str | float = "1ep"

    def __post_init__(self) -> None:
        start, end = self.moments
        if start.unit is end.unit and start.value > end.value:
            raise ValueError(f"{start.text} must not come after {end.text}.")
        if self.interval.value <= 0:
            raise ValueError(f"{self.interval.text} must be more than nothing.")

    @property
    def moments(self) -> tuple[Moment, ...]:
        """Start and end."""
        return Moment.parse(self.start, "start"), Moment.parse(self.end, "end")

    @property
    def interval(self) -> Moment:
        """The time between events."""
        return Moment.parse(self.every, "every")

    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """The shape, between start and end."""
        start, end = anchors
        return 1.0 if position >= end else self.shape((position - start) / (end - start))

    @abstractmethod
    def shape(self, t: float) -> float:
        """Share of the target at ``t`` in [0, 1) of the way from start to end."""


@dataclass(frozen=True, repr=False)
class Cubic(Ramp):
    r"""Fast at first, slower as less is left: :math:`1 - (1 - t)^3`.

    Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878.

    >>> schedule = Cubic(start="10%", end="50%")
    >>> [schedule(progress) for progress in (0.0, 0.1, 0.3, 0.5, 1.0)]
    [0.0, 0.0, 0.875, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """One minus the cube of what is left."""
        return 1 - (1 - t) ** 3


@dataclass(frozen=True, repr=False)
class Linear(Ramp):
    """The same share at every event: ``t``.

    >>> schedule = Linear(start="25%", end="75%")
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """The way itself."""
        return t


@dataclass(frozen=True, repr=False)
class Exponential(Ramp):
    r"""What is left to remove decays at a constant rate: :math:`(1 - e^{-5t}) / (1 - e^{-5})`.

    Half of the target is gone after 14 % of the way (the cubic needs 21 %). The rate is ours.

    >>> schedule = Exponential(start="0%", end="50%")
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.07, 0.25, 0.5, 1.0)]
    [0.0, 0.507, 0.924, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """Decay towards one, scaled to reach it."""
        return math.expm1(-5 * t) / math.expm1(-5)


@dataclass(frozen=True, repr=False)
class OneShot(Schedule):
    """All at once.

    Args:
        at: When.

    >>> schedule = OneShot(at="30%")
    >>> [schedule(progress) for progress in (0.0, 0.29, 0.3, 1.0)]
    [0.0, 0.0, 1.0, 1.0]
    """

    at: str | float = "30%"

    def __post_init__(self) -> None:
        _ = self.moments

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The one moment."""
        return (Moment.parse(self.at, "at"),)

    @property
    def interval(self) -> None:
        """No further events."""
        return

    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """Everything."""
        return 1.0


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """Given shares of the target at given moments.

    Args:
        shares: Moment to share of the target gone from then on; rising, the last 1.

    Raises:
        ValueError: If a moment does not parse, or the shares do not rise to 1.

    >>> schedule = Steps({"20%": 0.3, "50%": 1.0})
    >>> [schedule(progress) for progress in (0.0, 0.2, 0.4, 0.5, 1.0)]
    [0.0, 0.3, 0.3, 1.0, 1.0]
    """

    shares: Mapping[str, float] = field(default_factory=lambda: {"20%": 0.5, "50%": 1.0})

    def __post_init__(self) -> None:
        if not isinstance(self.shares, Mapping) or not all(is_number(share) for share in self.shares.values()):
            raise ValueError(f"shares={self.shares!r} must map moments to numbers.")
        object.__setattr__(self, "shares", dict(self.shares))  # the caller's may change
        shares = list(self.shares.values())
        rising = all(a < b for a, b in zip([0.0, *shares], shares, strict=False))
        if not shares or not rising or shares[-1] != 1:
            raise ValueError(f"shares={self.shares!r} must rise from above 0 to 1 at the end.")
        for earlier, later in zip(self.moments, self.moments[1:], strict=False):
            if earlier.unit is later.unit and earlier.value >= later.value:
                raise ValueError(f"{later.text} must come after {earlier.text}.")

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The moments given."""
        return tuple(Moment.parse(moment, "shares") for moment in self.shares)

    @property
    def interval(self) -> None:
        """No further events."""
        return

    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """The share of the latest moment that has passed."""
        passed = sum(anchor <= position for anchor in anchors)
        return list(self.shares.values())[passed - 1]
