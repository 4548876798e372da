"""What happened on the way: pruning events, and looks at the metric that the run is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_prune.core import schema
from lightning_prune.report.report import HISTORY_ENTRY, HistoryEntry, dense_metric, last_metric

HISTORY: dict[str, schema.Reader[Any]] = {
    "history": schema.sequence(HISTORY_ENTRY),
    "monitor": schema.optional(schema.string),
}


class History:
    """Pruning events, and the monitored metric beside the sparsity that it was measured at.

    Validation, a training step or the end of an epoch may log the metric. Where it was logged shows in its
    tensor: logging puts a new one among the metrics.

    Attributes:
        monitor: Name of the metric, ``None`` if there is none.
        entries: Events and looks at the metric, in order.
    """

    def __init__(self) -> None:
        self.monitor: str | None = None
        self.entries: list[HistoryEntry] = []
        self._before_epoch: Tensor | None = None
        self._before_validation: Tensor | None = None
        self._noted = False

    @property
    def sparsity(self) -> float:
        """Removed share after the last event."""
        return self.entries[-1].sparsity if self.entries else 0.0

    @property
    def measured(self) -> float | None:
        """The metric last measured since the last event, ``None`` if none was."""
        return self.entries[-1].metric if self.entries else None

    @property
    def reference(self) -> float | None:
        """The metric last measured before anything was removed; if none was, the latest one, or ``None``."""
        dense = dense_metric(self.entries)
        return last_metric(self.entries) if dense is None else dense

    def begin_fit(self, monitor: str | None) -> None:
        """No metric is logged yet. Earlier looks at another metric are left out: they do not compare."""
        if monitor not in (None, self.monitor):
            self.monitor = monitor
            self.entries = [entry for entry in self.entries if entry.metric is None]
        self.begin_epoch({})

    def prune(self, epoch: int, step: int, sparsity: float) -> None:
        """Notes an event."""
        self.entries.append(HistoryEntry(epoch, step, sparsity))

    def begin_epoch(self, metrics: Mapping[str, Tensor]) -> None:
        """Remembers the metric, to tell whether this epoch measures it."""
        self._before_epoch = self._metric(metrics)
        self._noted = False

    def end_epoch(self, metrics: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Notes the metric if the epoch logged it, and it is not noted yet."""
        if not self._noted:
            self._note(metrics, epoch, step, self._before_epoch)

    def begin_validation(self, metrics: Mapping[str, Tensor]) -> None:
        """Remembers the metric, to tell whether this validation measures it."""
        self._before_validation = self._metric(metrics)

    def end_validation(self, metrics: Mapping[str, Tensor], epoch: int, step: int) -> None:
        """Notes the metric if the validation logged it."""
        self._note(metrics, epoch, step, self._before_validation)

    def _metric(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        return metrics.get(self.monitor or "")

    def _note(self, metrics: Mapping[str, Tensor], epoch: int, step: int, before: Tensor | None) -> None:
        value = self._metric(metrics)
        if value is not None and value is not before:
            self.entries.append(HistoryEntry(epoch, step, self.sparsity, float(value)))
            self._noted = True

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"history": [asdict(entry) for entry in self.entries], "monitor": self.monitor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved history, as ``HISTORY`` reads it."""
        self.entries = list(state["history"])
        self.monitor = state["monitor"]
