"""What a report lists: the layers of the network, and the entries of its history."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from lightning_prune.core import schema


@dataclass(frozen=True)
class Layer:
    """One pruned parameter.

    Args:
        name: Name in ``named_parameters()``.
        shape: Shape of the parameter before compaction.
        size: Number of weights.
        kept: Number of kept weights; ``None`` in a plan that depends on training steps.
        compacted: Shape after compaction; ``None`` before it.
        width: Number of indices along the first dimension (filters or neurons) with at least one kept weight;
            ``None`` if not counted.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int | None
    compacted: tuple[int, ...] | None = None
    width: int | None = None

    @property
    def remaining(self) -> int:
        """Number of kept weights; all of them if it is not known yet."""
        return self.size if self.kept is None else self.kept

    @property
    def full_width(self) -> int:
        """Number of indices along the first dimension, 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def remaining_width(self) -> int:
        """Number of indices along the first dimension with a kept weight; all of them if not counted."""
        return self.full_width if self.width is None else self.width


@dataclass(frozen=True)
class HistoryEntry:
    """An entry of the history: a pruning event, or a measurement of the monitored metric.

    Args:
        epoch: The epoch in which it happened.
        step: Number of optimizer steps before it.
        sparsity: Removed share of the covered elements after it.
        metric: Value of the monitored metric, ``None`` for a pruning event.
    """

    epoch: int
    step: int
    sparsity: float
    metric: float | None = None


def last_metric(history: Iterable[HistoryEntry]) -> float | None:
    """Return the last value of the metric in a history, ``None`` if there is none."""
    return next((entry.metric for entry in reversed(list(history)) if entry.metric is not None), None)


def dense_metric(history: Iterable[HistoryEntry]) -> float | None:
    """Return the last value of the metric before the first removal, ``None`` if there is none."""
    return last_metric(takewhile(lambda entry: entry.sparsity == 0, history))


# --- schemas of saved reports

HISTORY_ENTRY = schema.dataclass_of(
    HistoryEntry,
    epoch=schema.integer(-1),
    step=schema.integer(),
    sparsity=schema.fraction,
    metric=schema.optional(schema.number()),
)
_SHAPE = schema.sequence(schema.integer())
LAYER = schema.dataclass_of(
    Layer,
    name=schema.string,
    shape=_SHAPE,
    size=schema.integer(1),
    kept=schema.optional(schema.integer()),
    compacted=schema.optional(_SHAPE),
    width=schema.optional(schema.integer()),
)
