"""Points in training: "30%" of the fit, "5ep" epochs, "200st" optimizer steps. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from lightning_prune.core.parts import is_number

_ALLOWED = 'a share of the fit ("30%" or 0.3), epochs ("5ep") or optimizer steps ("200st")'
_PATTERN = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(%|ep|st)\s*")


class TimeUnit(Enum):
    """What a moment is counted in."""

    FIT = "%"
    EPOCH = "ep"
    STEP = "st"


@dataclass(frozen=True)
class Moment:
    """A point in training, or a stretch of it, held exactly.

    Args:
        value: How many of ``unit``; a share in [0, 1] for ``Unit.FIT``.
        unit: What is counted.
        text: What the user wrote, with the argument's name, for messages.
    """

    value: Fraction
    unit: TimeUnit
    text: str

    @classmethod
    def parse(cls, moment: str | float, argument: str) -> Moment:
        """Reads what a user writes.

        >>> Moment.parse("12.5%", "start").value
        Fraction(1, 8)
        >>> Moment.parse("5ep", "start").unit
        <Unit.EPOCH: 'ep'>
        >>> Moment.parse("soon", "start")
        Traceback (most recent call last):
        ValueError: start='soon' is no moment: give a share of the fit ("30%" or 0.3), epochs ("5ep") or
        optimizer steps ("200st").

        Raises:
            ValueError: If it is no moment, or a share beyond 100 %.
        """
        text = f"{argument}={moment!r}"
        if isinstance(moment, str):
            match = _PATTERN.fullmatch(moment)
            if match is None:
                raise ValueError(f"{text} is no moment: give {_ALLOWED}.")
            value, unit = Fraction(match[1]), TimeUnit(match[2])
            value /= 100 if unit is TimeUnit.FIT else 1
        elif not is_number(moment):
            raise ValueError(f"{text} is no moment: give {_ALLOWED}.")
        else:
            # str() gives the decimal that the user wrote, not the binary fraction beside it
            value, unit = Fraction(str(moment)), TimeUnit.FIT
        if unit is TimeUnit.FIT and not 0 <= value <= 1:
            raise ValueError(f"{text} must lie between 0 and 100 % of the fit: give {_ALLOWED}.")
        if unit is TimeUnit.STEP and value.denominator != 1:
            raise ValueError(f"{text} must be a whole number of optimizer steps.")
        return cls(value, unit, text)


@dataclass(frozen=True)
class FitLength:
    """How long a fit is, as far as is known before it starts.

    Args:
        epochs: Epochs in all; ``None`` without a limit.
        steps: Limit in optimizer steps; ``None`` without one.
        steps_per_epoch: Optimizer steps in an epoch; ``None`` if the data have no length, or it changes.
    """

    epochs: int | None
    steps: int | None
    steps_per_epoch: int | None

    @property
    def length(self) -> int | None:
        """Optimizer steps in all, ``None`` if that cannot be known."""
        known = [] if self.steps is None else [self.steps]
        if self.epochs is not None and self.steps_per_epoch is not None:
            known.append(self.epochs * self.steps_per_epoch)
        return min(known, default=None)

    @property
    def epochs_begun(self) -> int | None:
        """Epochs that the fit begins, ``None`` if that cannot be known."""
        known = [] if self.epochs is None else [self.epochs]
        if self.steps is not None and self.steps_per_epoch is not None:
            known.append(-(-self.steps // self.steps_per_epoch))
        return min(known, default=None)

    @property
    def ends_by_steps(self) -> bool:
        """Whether the limit in steps, not that in epochs, is what ends the fit."""
        if self.steps is None:
            return False
        if self.epochs is None:
            return True
        return self.steps_per_epoch is not None and self.steps < self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Grid:
    """Where moments fall in one fit: at epoch starts, or before batches.

    Everything that a schedule names falls on the same grid, so that its events can be ordered.

    Args:
        horizon: The fit.
        unit: ``Unit.EPOCH`` (positions are epochs) or ``Unit.STEP`` (optimizer steps).
    """

    horizon: FitLength
    unit: TimeUnit

    @classmethod
    def of(cls, moments: list[Moment], horizon: FitLength) -> Grid:
        """Epochs wherever they can carry every moment, optimizer steps otherwise."""
        shares = any(moment.unit is TimeUnit.FIT for moment in moments)
        by_steps = (
            any(moment.unit is TimeUnit.STEP for moment in moments)
            or horizon.epochs_begun == 1
            or (shares and (horizon.epochs is None or horizon.ends_by_steps))
        )
        return cls(horizon, TimeUnit.STEP if by_steps else TimeUnit.EPOCH)

    def position(self, moment: Moment) -> int:
        """The position of a point in training.

        "%" and "ep" round to the nearest epoch start in 1 .. epochs - 1 (half to even), in a fit of
        one epoch, or one that a number of steps ends, to the nearest batch; 0 stays before the first batch.

        Raises:
            ValueError: If the moment lies beyond the fit, or cannot be placed in it.
        """
        if moment.value == 0:
            return 0
        place = self.length_of(moment)
        end = self.horizon.length if self.unit is TimeUnit.STEP else self.horizon.epochs_begun
        if end is not None and place > end:
            raise ValueError(f"{moment.text} lies beyond the fit, which has {self._in_words(end)}.")
        if self.unit is TimeUnit.STEP and self._on_epoch_starts(moment):
            per_epoch = self._steps_per_epoch(moment)
            return self._inside(place / per_epoch, self.horizon.epochs_begun, moment) * per_epoch
        return self._inside(place, end, moment)

    def length_of(self, moment: Moment) -> Fraction:
        """A stretch of training in positions, not rounded."""
        if moment.unit is TimeUnit.STEP:
            return moment.value
        if self.unit is TimeUnit.STEP and moment.unit is TimeUnit.EPOCH:
            return moment.value * self._steps_per_epoch(moment)
        if moment.unit is TimeUnit.EPOCH:
            return moment.value
        whole = self.horizon.epochs if self.unit is TimeUnit.EPOCH else self.horizon.length
        if whole is None:
            raise ValueError(
                f"{moment.text} needs to know how long the fit is: set a finite max_epochs with data that have"
                ' a length and accumulation that does not change, or max_steps; or count in "ep" or "st".'
            )
        return moment.value * whole

    def _on_epoch_starts(self, moment: Moment) -> bool:
        if self.horizon.epochs_begun == 1 or moment.unit is TimeUnit.STEP:
            return False
        return moment.unit is TimeUnit.EPOCH or not self.horizon.ends_by_steps

    def _steps_per_epoch(self, moment: Moment) -> int:
        if self.horizon.steps_per_epoch is None:
            raise ValueError(
                f"{moment.text} cannot be turned into optimizer steps, since the training data have no"
                ' length, or accumulation changes: count every moment in "ep", or every one in "st".'
            )
        return self.horizon.steps_per_epoch

    def _inside(self, place: Fraction, end: int | None, moment: Moment) -> int:
        """Rounds to a boundary that has training before it and after it."""
        if end is None:
            return max(1, round(place))
        if end == 1 or (moment.unit is TimeUnit.STEP and place >= end):
            raise ValueError(f"{moment.text} leaves no training after it in a fit of {self._in_words(end)}.")
        return min(max(1, round(place)), end - 1)

    def _in_words(self, end: int) -> str:
        return f"{end} {'optimizer steps' if self.unit is TimeUnit.STEP else 'epochs'}"
