"""Points in training, as "30%" of the fit, "5ep" (epochs) or "200st" (optimizer steps), and their positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from lightning_prune.core.parts import is_number

_ALLOWED = 'a share of the fit ("30%" or 0.3), epochs ("5ep") or optimizer steps ("200st")'
_PATTERN = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(%|ep|st)\s*")


class TimeUnit(Enum):
    """The unit that a moment is counted in."""

    FIT = "%"
    EPOCH = "ep"
    STEP = "st"


@dataclass(frozen=True)
class Moment:
    """A point in training, or a length of time in it, as an exact number.

    Args:
        value: How many of ``unit``; a share in [0, 1] for ``TimeUnit.FIT``.
        unit: The unit of ``value``.
        text: The user's text with the argument's name, for error messages.
    """

    value: Fraction
    unit: TimeUnit
    text: str

    @classmethod
    def parse(cls, moment: str | float, argument: str, *, key: bool = False) -> Moment:
        """Return the moment that a user's text or number stands for.

        >>> Moment.parse("12.5%", "start").value
        Fraction(1, 8)
        >>> Moment.parse("5ep", "start").unit
        <TimeUnit.EPOCH: 'ep'>
        >>> Moment.parse("soon", "start")
        Traceback (most recent call last):
        ValueError: start='soon' is no moment: give a share of the fit ("30%" or 0.3), epochs ("5ep") or
        optimizer steps ("200st").

        Args:
            moment: A text such as "30%", "5ep" or "200st", or a number as a share of the fit.
            argument: Name of the argument that it was given for, for error messages.
            key: Whether the argument is a mapping, and the moment one of its keys.

        Raises:
            ValueError: If it is no moment, a share beyond 100 %, or a fraction of an optimizer step.
        """
        text = f"moment {moment!r} in {argument}" if key else f"{argument}={moment!r}"
        match = _PATTERN.fullmatch(moment) if isinstance(moment, str) else None
        if match is not None:
            value, unit = Fraction(match[1]), TimeUnit(match[2])
            value /= 100 if unit is TimeUnit.FIT else 1
        elif is_number(moment):
            # str() gives the decimal number that the user wrote, not the nearest binary fraction
            value, unit = Fraction(str(moment)), TimeUnit.FIT
        else:
            raise ValueError(f"{text} is no moment: give {_ALLOWED}.")
        if unit is TimeUnit.FIT and not 0 <= value <= 1:
            raise ValueError(f"{text} must lie between 0 and 100 % of the fit: give {_ALLOWED}.")
        if unit is TimeUnit.STEP and value.denominator != 1:
            raise ValueError(f"{text} must be a whole number of optimizer steps.")
        return cls(value, unit, text)


def parse_horizon(horizon: str | None) -> Moment | None:
    """Return the length of training as a whole, a whole number of epochs or optimizer steps.

    >>> parse_horizon("10ep").value
    Fraction(10, 1)
    >>> parse_horizon("50%")
    Traceback (most recent call last):
    ValueError: horizon='50%' must be a whole number of epochs ("10ep") or optimizer steps ("2000st"), above 0.

    Raises:
        ValueError: If it is something else; ``None`` stays ``None``.
    """
    if horizon is None:
        return None
    match = _PATTERN.fullmatch(horizon) if isinstance(horizon, str) else None
    if match is None or match[2] == "%" or not match[1].isdigit() or int(match[1]) == 0:
        raise ValueError(
            f'horizon={horizon!r} must be a whole number of epochs ("10ep") or optimizer steps ("2000st"),'
            " above 0."
        )
    return Moment.parse(horizon, "horizon")


@dataclass(frozen=True)
class FitLength:
    """The length of a fit, as far as it is known before the fit starts.

    Args:
        epochs: Maximum number of epochs; ``None`` without a limit.
        steps: Maximum number of optimizer steps; ``None`` without a limit.
        steps_per_epoch: Optimizer steps in an epoch; ``None`` if the data have no length, or it changes.
    """

    epochs: int | None
    steps: int | None
    steps_per_epoch: int | None

    def of_plan(self, whole: Moment | None) -> FitLength:
        """Return the length of the training that a fit is a part of.

        Args:
            whole: Number of epochs or optimizer steps, as :func:`parse_horizon` returns it; ``None`` if the fit
                is all of it.
        """
        if whole is None:
            return self
        count = int(whole.value)
        epochs, steps = (count, None) if whole.unit is TimeUnit.EPOCH else (None, count)
        return FitLength(epochs, steps, self.steps_per_epoch)

    @property
    def length(self) -> int | None:
        """Number of optimizer steps of the fit, ``None`` if it cannot be known."""
        known = [] if self.steps is None else [self.steps]
        if self.epochs is not None and self.steps_per_epoch is not None:
            known.append(self.epochs * self.steps_per_epoch)
        return min(known, default=None)

    @property
    def epochs_begun(self) -> int | None:
        """Number of epochs that the fit begins, ``None`` if it cannot be known."""
        known = [] if self.epochs is None else [self.epochs]
        if self.steps is not None and self.steps_per_epoch is not None:
            known.append(-(-self.steps // self.steps_per_epoch))
        return min(known, default=None)

    @property
    def ends_by_steps(self) -> bool:
        """Whether the fit ends at the limit in steps, before the limit in epochs."""
        if self.steps is None:
            return False
        if self.epochs is None:
            return True
        return self.steps_per_epoch is not None and self.steps < self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Grid:
    """The positions in one fit at which events can happen: starts of epochs, or optimizer steps.

    All moments of a schedule are placed on the same grid, so that its events can be ordered.

    Args:
        horizon: The length of the fit.
        unit: ``TimeUnit.EPOCH`` if positions are epochs, ``TimeUnit.STEP`` if they are optimizer steps.
    """

    horizon: FitLength
    unit: TimeUnit

    @classmethod
    def of(cls, moments: list[Moment], horizon: FitLength) -> Grid:
        """Return a grid of epochs if it can place every moment, otherwise one of optimizer steps."""
        shares = any(moment.unit is TimeUnit.FIT for moment in moments)
        by_steps = (
            any(moment.unit is TimeUnit.STEP for moment in moments)
            or horizon.epochs_begun == 1
            or (shares and (horizon.epochs is None or horizon.ends_by_steps))
        )
        return cls(horizon, TimeUnit.STEP if by_steps else TimeUnit.EPOCH)

    def position(self, moment: Moment) -> int:
        """Return the position of a point in training.

        "%" and "ep" are rounded to the nearest epoch start in 1 .. epochs - 1 (half to even); to the nearest
        optimizer step if the fit has one epoch, and for "%" also if a number of steps ends the fit. 0 is before
        the first batch.

        Raises:
            ValueError: If the moment lies beyond the fit, or cannot be placed in it.
        """
        if moment.value == 0:
            return 0
        place = self.length_of(moment)
        end = self.horizon.length if self.unit is TimeUnit.STEP else self.horizon.epochs_begun
        if end is not None and place > end:
            raise ValueError(
                f"{moment.text} lies beyond the fit, which has {self._in_words(end)}. If other fits go on with"
                " it, horizon says how long training is as a whole, as horizon='10ep'."
            )
        if self.unit is TimeUnit.STEP and self._on_epoch_starts(moment):
            per_epoch = self._steps_per_epoch(moment)
            return self._round_inside(place / per_epoch, self.horizon.epochs_begun, moment) * per_epoch
        return self._round_inside(place, end, moment)

    def length_of(self, moment: Moment) -> Fraction:
        """Return the length of a period of training in positions, not rounded.

        Raises:
            ValueError: If the length of the fit, or of an epoch, has to be known and is not.
        """
        if moment.unit is TimeUnit.STEP:
            return moment.value
        if moment.unit is TimeUnit.EPOCH:
            return moment.value * (self._steps_per_epoch(moment) if self.unit is TimeUnit.STEP else 1)
        whole = self.horizon.epochs if self.unit is TimeUnit.EPOCH else self.horizon.length
        if whole is None:
            raise ValueError(f"{moment.text} needs to know how long the fit is: {self._to_know_the_length()}.")
        return moment.value * whole

    def _on_epoch_starts(self, moment: Moment) -> bool:
        if self.horizon.epochs_begun == 1 or moment.unit is TimeUnit.STEP:
            return False
        return moment.unit is TimeUnit.EPOCH or not self.horizon.ends_by_steps

    def _steps_per_epoch(self, moment: Moment) -> int:
        if self.horizon.steps_per_epoch is None:
            raise ValueError(
                f"{moment.text} cannot be turned into optimizer steps, since the training data have no"
                f" length, or accumulation changes: {self._to_avoid_epochs()}."
            )
        return self.horizon.steps_per_epoch

    def _to_know_the_length(self) -> str:
        """Return what to do where shares of the fit cannot be placed."""
        if self.horizon.epochs_begun == 1:
            return 'set limit_train_batches, or max_steps and every= in "st"; or count every moment in "st"'
        return (
            "set a finite max_epochs with data that have a length and accumulation that does not change, or"
            ' max_steps with max_epochs=-1 and every= in "st"; or count every moment, every= too, in "ep", or'
            ' every one in "st"'
        )

    def _to_avoid_epochs(self) -> str:
        """Return what to do where the number of steps in an epoch is needed and not known."""
        if self.horizon.epochs_begun == 1:  # there is no start of another epoch to prune at
            return 'count every moment, every= too, in "st", or set limit_train_batches'
        return 'count every moment, every= too, in "ep", or every one in "st"'

    def _round_inside(self, place: Fraction, end: int | None, moment: Moment) -> int:
        """Round to a position that has training before and after it.

        Raises:
            ValueError: If there is no such position.
        """
        if end is None:
            return max(1, round(place))
        if end == 1 or (moment.unit is TimeUnit.STEP and place >= end):
            raise ValueError(f"{moment.text} leaves no training after it in a fit of {self._in_words(end)}.")
        return min(max(1, round(place)), end - 1)

    def _in_words(self, end: int) -> str:
        return f"{end} {'optimizer steps' if self.unit is TimeUnit.STEP else 'epochs'}"
