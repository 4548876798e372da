"""How much of a metric pruning may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_prune.core.parts import Part, is_integer, is_number

_MODES = ("min", "max")


@dataclass(frozen=True, repr=False)
class Guard(Part):
    """Ends pruning where it costs too much of a metric, and goes back to the last network that was good enough.

    A round is a pruning event and the training up to the next one, or to the end of the fit. Its metric is the
    one that was measured last in it; the dense one was measured last before the first event. When a round ends:

    - Within ``max_drop``, the network as it stands is the last good one, and pruning goes on as scheduled.
    - Worse, but not more than ``patience`` times in a row: the next event takes half of its step.
    - Worse once more, or at the end of the fit: weights, buffers, masks and what optimizers remember are again
      those of the last good round, or of the dense network; nothing more is pruned. Learning rates go on.

    A round in which the metric was not measured cannot be judged: pruning goes on, with a warning. The rule is
    ours. Where several devices each measure a value of their own, that of the first counts.

    Args:
        monitor: The metric, as validation logs it.
        mode: Whether it should be "max" or "min".
        max_drop: How much worse than the dense network it may be, in its own units: finite, from 0 on.
        patience: How many bad rounds in a row only make steps smaller, from 0 on.

    Raises:
        ValueError: If an argument is none of these.
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
        """Whether a value is good enough; nan never is.

        >>> [Guard("acc", max_drop=0.25).allows(0.75, value) for value in (0.5, 0.4375, float("nan"))]
        [True, False, False]
        >>> Guard("loss", "min", max_drop=0.25).allows(0.75, 1.0)
        True
        """
        drop = dense - value if self.mode == "max" else value - dense
        return drop <= self.max_drop

    def compare(self, dense: float, value: float) -> str:
        """A value beside the dense one, in words.

        >>> Guard("val_acc", max_drop=0.05).compare(0.79, 0.71)
        'val_acc 0.71 is 0.08 below the dense 0.79, more than max_drop=0.05'
        """
        distance = value - dense
        if math.isnan(distance):
            return f"{self.monitor} {value:.4g} does not compare with the dense {dense:.4g}"
        where = f"{abs(distance):.4g} {'below' if distance < 0 else 'above'}" if distance else "equal to"
        bound = "within" if self.allows(dense, value) else "more than"
        return f"{self.monitor} {value:.4g} is {where} the dense {dense:.4g}, {bound} max_drop={self.max_drop}"
