"""Guard: the setting that limits how much of a validation metric pruning may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_prune.core.parts import Part, is_integer, is_number

_MODES = ("min", "max")


@dataclass(frozen=True, repr=False)
class Guard(Part):
    """Stops pruning when a metric drops too far, and restores the last network that was good enough.

    A round is a pruning event and the training up to the next event, or to the end of the fit. Its metric is
    the last value measured in it; the dense metric is the last value measured before the first event. At the
    end of a round:

    - If the metric is worse than the dense one by at most ``max_drop``, the round is good: the present network
      becomes the last good one, and pruning goes on as scheduled.
    - If it is worse by more than that, at most ``patience`` times in a row: the next event removes half of what
      the schedule would add.
    - If it is worse once more, or the fit ends: weights, buffers, masks and optimizer state of the last good
      round (or of the dense network) are restored, and nothing more is pruned. Learning rates are not restored.

    A round in which the metric was not measured is not compared: pruning goes on, with a warning. The rule is
    not from a paper. Where each process measures a value of its own, that of rank 0 counts.

    Args:
        monitor: Name of the metric, as validation logs it; or as training steps log it, without a sanity check
            of the validation (``num_sanity_val_steps=0``).
        mode: "max" if a higher metric is better, "min" if a lower one is.
        max_drop: How much worse than the dense metric a round may be, in the metric's units: finite, >= 0.
        patience: How many bad rounds in a row only halve the next step, >= 0.

    Raises:
        ValueError: If an argument is outside these ranges.
    """

    monitor: str
    mode: Literal["min", "max"] = "max"
    max_drop: float = 0.01
    patience: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ValueError(f"monitor={self.monitor!r} must be the name of a logged metric.")
        if self.mode not in _MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(map(repr, _MODES))}.")
        drop, patience = self.max_drop, self.patience
        if not is_number(drop) or drop < 0:
            raise ValueError(f"max_drop={drop!r} must be a finite number from 0 on.")
        if not is_integer(patience) or patience < 0:
            raise ValueError(f"patience={patience!r} must be an integer from 0 on.")

    def allows(self, dense: float, value: float) -> bool:
        """Return whether a value is worse than the dense one by at most ``max_drop``; False for nan.

        >>> [Guard("acc", max_drop=0.25).allows(0.75, value) for value in (0.5, 0.4375, float("nan"))]
        [True, False, False]
        >>> Guard("loss", "min", max_drop=0.25).allows(0.75, 1.0)
        True
        """
        drop = dense - value if self.mode == "max" else value - dense
        return drop <= self.max_drop

    def compare(self, dense: float, value: float) -> str:
        """Return a sentence that compares a value with the dense one.

        >>> Guard("val_acc", max_drop=0.05).compare(0.79, 0.71)
        'val_acc 0.71 is 0.08 below the dense 0.79, more than max_drop=0.05'
        """
        distance = value - dense
        if math.isnan(distance):
            return f"{self.monitor} {value:.4g} does not compare with the dense {dense:.4g}"
        where = f"{abs(distance):.4g} {'below' if distance < 0 else 'above'}" if distance else "equal to"
        bound = "within" if self.allows(dense, value) else "more than"
        return f"{self.monitor} {value:.4g} is {where} the dense {dense:.4g}, {bound} max_drop={self.max_drop}"
