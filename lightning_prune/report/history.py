"""The history of a run: pruning events, and measurements of the monitored metric with the sparsity then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_prune.core import schema
from lightning_prune.report.entries import HISTORY_ENTRY, HistoryEntry, dense_metric, last_metric

HISTORY: dict[str, schema.Reader[Any]] = {
    "history": schema.sequence(HISTORY_ENTRY),
    "monitor": schema.optional(schema.string),
}


class History:
    """Pruning events, and measurements of the monitored metric with the sparsity at which they were made.

    Validation, a training step or the end of an epoch may log the metric. Lightning puts a new tensor among its
    metrics whenever one is logged, so another tensor than before means that the metric was logged since.

    Attributes:
        monitor: Name of the monitored metric, ``None`` if there is none.
        entries: Events and measurements in order.
    """

    def __init__(self) -> None:
        self.monitor: str | None = None
        self.entries: list[HistoryEntry] = []
        self._before_epoch: Tensor | None = None
        self._before_validation: Tensor | None = None
        self._noted = False

    @property
    def sparsity(self) -> float:
        """Removed share of the covered elements after the last event; 0 before the first."""
        return self.entries[-1].sparsity if self.entries else 0.0

    @property
    def measured(self) -> float | None:
        """The last value of the metric measured after the last event, ``None`` if there is none."""
        return self.entries[-1].metric if self.entries else None

    @property
    def reference(self) -> float | None:
        """The last value of the metric at sparsity 0; without one the last value at all, or ``None``."""
        dense = dense_metric(self.entries)
        return last_metric(self.entries) if dense is None else dense

    def begin_fit(self, monitor: str | None) -> None:
        """Set the monitored metric of a new fit.

        Measurements of another metric are dropped, because they cannot be compared with those of this one. No
        value counts as logged yet.

        Args:
            monitor: Name of the metric; ``None`` keeps the present one.
        """
        if monitor not in (None, self.monitor):
            self.monitor = monitor
            self.entries = [entry for entry in self.entries if entry.metric is None]
        self.begin_epoch({})

    def record_event(self, epoch: int, step: int, sparsity: float) -> None:
        """Record a pruning event, with the sparsity after it."""
        self.entries.append(HistoryEntry(epoch, step, sparsity))

    def begin_epoch(self, metrics: Mapping[str, Tensor]) -> None:
        """Remember the present value of the metric, to detect whether the epoch logs a new one."""
        self._before_epoch = self._metric(metrics)
        self._noted = False

    def end_epoch(self, metrics: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Record the metric if the epoch logged it, and no validation in the epoch has recorded it already."""
        if not self._noted:
            self._note(metrics, epoch, step, self._before_epoch)

    def begin_validation(self, metrics: Mapping[str, Tensor]) -> None:
        """Remember the present value of the metric, to detect whether the validation logs a new one."""
        self._before_validation = self._metric(metrics)

    def end_validation(self, metrics: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Record the metric if the validation logged it."""
        self._note(metrics, epoch, step, self._before_validation)

    def _metric(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        return metrics.get(self.monitor or "")

    def _note(self, metrics: Mapping[str, Tensor], epoch: int, step: int, before: Tensor | None) -> None:
        value = self._metric(metrics)
        if value is not None and value is not before:
            self.entries.append(HistoryEntry(epoch, step, self.sparsity, float(value)))
            self._noted = True

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain values, for checkpoints."""
        return {"history": [asdict(entry) for entry in self.entries], "monitor": self.monitor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the history by a saved one, as read with the ``HISTORY`` schema."""
        self.entries = list(state["history"])
        self.monitor = state["monitor"]
