"""The schedules of the package: gradual ones (Cubic, Linear, Exponential), OneShot and Steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from lightning_prune.core.parts import is_number
from lightning_prune.schedules.base import Schedule
from lightning_prune.schedules.moments import Moment


@dataclass(frozen=True, repr=False)
class Ramp(Schedule, ABC):
    """Gradual pruning: from nothing at ``start`` to the whole target at ``end``, in regular events.

    Args:
        start: Moment of the first event.
        end: Moment of the last event, which always happens.
        every: The time between events. Without a Trainer it is not used: the caller decides when to prune.

    Raises:
        ValueError: If a moment does not parse, ``start`` comes after ``end``, or ``every`` is 0.
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
        """Return ``shape`` of the way from start to end; 1 from the end on."""
        start, end = anchors
        return 1.0 if position >= end else self.shape((position - start) / (end - start))

    @abstractmethod
    def shape(self, t: float) -> float:
        """Return the share of the target at ``t`` in [0, 1) of the way from start to end."""


@dataclass(frozen=True, repr=False)
class Cubic(Ramp):
    r"""Cubic sparsity: fast at first, slower later, :math:`1 - (1 - t)^3`.

    Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878.

    >>> schedule = Cubic(start="10%", end="50%")
    >>> [schedule(progress) for progress in (0.0, 0.1, 0.3, 0.5, 1.0)]
    [0.0, 0.0, 0.875, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """Return 1 minus the cube of the remaining share of the way."""
        return 1 - (1 - t) ** 3


@dataclass(frozen=True, repr=False)
class Linear(Ramp):
    """Linear sparsity: the same share of the target at every event, ``t``.

    >>> schedule = Linear(start="25%", end="75%")
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """Return ``t`` itself."""
        return t


@dataclass(frozen=True, repr=False)
class Exponential(Ramp):
    r"""Exponential decay of the units that are left to remove: :math:`(1 - e^{-5t}) / (1 - e^{-5})`.

    Half of the target is removed after 14 % of the way (Cubic needs 21 %). The rate of 5 is a choice of this
    package, not from a paper.

    >>> schedule = Exponential(start="0%", end="50%")
    >>> [round(schedule(progress), 3) for progress in (0.0, 0.07, 0.25, 0.5, 1.0)]
    [0.0, 0.507, 0.924, 1.0, 1.0]
    """

    def shape(self, t: float) -> float:
        """Return one minus an exponential decay, scaled to be 1 at ``t`` = 1."""
        return math.expm1(-5 * t) / math.expm1(-5)


@dataclass(frozen=True, repr=False)
class OneShot(Schedule):
    """The whole target at once.

    Args:
        at: Moment of the only event.

    >>> schedule = OneShot(at="30%")
    >>> [schedule(progress) for progress in (0.0, 0.29, 0.3, 1.0)]
    [0.0, 0.0, 1.0, 1.0]
    """

    at: str | float = "30%"

    def __post_init__(self) -> None:
        _ = self.moments

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The moment of the only event."""
        return (Moment.parse(self.at, "at"),)

    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """Given shares of the target at given moments.

    Args:
        shares: Moment to the share of the target that is removed from then on; increasing, the last 1.

    Raises:
        ValueError: If a moment does not parse, or the shares do not rise to 1.

    >>> schedule = Steps({"20%": 0.3, "50%": 1.0})
    >>> [schedule(progress) for progress in (0.0, 0.2, 0.4, 0.5, 1.0)]
    [0.0, 0.3, 0.3, 1.0, 1.0]
    """

    shares: Mapping[str, float] = field(default_factory=lambda: {"20%": 0.5, "50%": 1.0})

    def __post_init__(self) -> None:
        if not isinstance(self.shares, Mapping) or not all(is_number(share) for share in self.shares.values()):
            raise ValueError(f"shares={self.shares!r} must map moments to shares of the target, numbers.")
        object.__setattr__(self, "shares", dict(self.shares))  # a copy, since the caller may change the mapping
        shares = list(self.shares.values())
        rising = all(a < b for a, b in pairwise([0.0, *shares]))
        if not shares or not rising or shares[-1] != 1:
            raise ValueError(
                f"shares={self.shares!r} must be shares of the target above 0 that rise to 1, which is all of"
                " it: half is 0.5."
            )
        for earlier, later in pairwise(self.moments):
            if earlier.unit is later.unit and earlier.value >= later.value:
                raise ValueError(f"{later.text} must come after {earlier.text}.")

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The given moments."""
        return tuple(Moment.parse(moment, "shares", key=True) for moment in self.shares)

    def fraction(self, position: float, anchors: Sequence[float]) -> float:
        """Return the share of the latest moment at or before ``position``."""
        passed = sum(anchor <= position for anchor in anchors)
        return list(self.shares.values())[passed - 1]
