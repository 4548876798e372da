"""What became of a network, in numbers: an object, as a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from os import PathLike
from typing import Any

from lightning_prune.core import schema
from lightning_prune.report.cost import COST, LATENCY, Cost
from lightning_prune.report.plots import draw_history, draw_sparsity, draw_widths
from lightning_prune.report.tables import format_table

_NO_SPEED = (
    "Zeros alone make nothing faster: the dense network still runs. They shrink a packed file, and speed up"
    " sparse kernels."
)


@dataclass(frozen=True)
class Layer:
    """One pruned parameter.

    Args:
        name: In ``named_parameters()``.
        shape: Of the parameter.
        size: Number of weights.
        kept: How many are still there; ``None`` in a plan that cannot know yet.
        compacted: Shape since the network was compacted; ``None`` before.
        width: Places along the first dimension where something is left: filters or neurons of a layer; ``None``
            in a plan.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int | None
    compacted: tuple[int, ...] | None = None
    width: int | None = None


@dataclass(frozen=True)
class HistoryEntry:
    """A line of the history: a pruning event, or a look at the monitored metric.

    Args:
        epoch: The epoch it fell in.
        step: Optimizer steps before it.
        sparsity: Removed share of the covered elements, after it.
        metric: Value of the monitored metric, ``None`` for a pruning event.
    """

    epoch: int
    step: int
    sparsity: float
    metric: float | None = None


def last_metric(history: Iterable[HistoryEntry]) -> float | None:
    """The last value in a history, ``None`` if there is none."""
    return next((entry.metric for entry in reversed(list(history)) if entry.metric is not None), None)


def dense_metric(history: Iterable[HistoryEntry]) -> float | None:
    """The last value before anything was removed, ``None`` if none was seen."""
    return last_metric(takewhile(lambda entry: entry.sparsity == 0, history))


@dataclass(frozen=True)
class Report:
    """A network as it stands, and how it got there.

    Args:
        layers: What the structure covers.
        params: Parameters in all, zeros included.
        bytes: Of parameters and buffers as they are stored.
        bytes_packed: Of the file that ``save_packed`` writes, but for some hundred bytes a tensor: a masked one
            is one bit a weight and the kept values, where that is less.
        macs: Multiply-adds of one example on the network that runs (``torch.utils.flop_counter`` halved);
            ``None`` without an example.
        macs_kept: The same, counting kept weights only: what a perfect sparse kernel would do.
        latency: Size of a batch to seconds of a forward pass; empty without an example.
        dense: What the network cost before it was compacted; ``None`` if it is not.
        frozen: What stays as it is, with the reason.
        protected: Layers that would have been emptied, and keep a last unit.
        left_out: Training steps left out of the statistics for inf or nan gradients.
        monitor: Name of the monitored metric.
        history: Events and looks at the metric, in order.
        decisions: Of a guard, in words.
    """

    layers: tuple[Layer, ...]
    params: int
    bytes: int
    bytes_packed: int
    macs: int | None = None
    macs_kept: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)
    dense: Cost | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    left_out: int = 0
    monitor: str | None = None
    history: tuple[HistoryEntry, ...] = ()
    decisions: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Elements that the structure covers."""
        return sum(layer.size for layer in self.layers)

    @property
    def removed(self) -> int:
        """How many of them are gone."""
        return sum(layer.size - layer.kept for layer in self.layers if layer.kept is not None)

    @property
    def sparsity(self) -> float:
        """Removed share of the elements that the structure covers; 0 if it covers none."""
        return self.removed / self.size if self.size else 0.0

    @property
    def dense_metric(self) -> float | None:
        """The last value before anything was removed, ``None`` if none was seen."""
        return dense_metric(self.history)

    @property
    def pruned_metric(self) -> float | None:
        """The last value at the present sparsity, ``None`` if none was seen."""
        return last_metric(event for event in self.history if event.sparsity == self.sparsity)

    def to_json(self) -> str:
        """All of it, as JSON; ``"sparsity"`` is the removed share of what the structure covers."""
        derived = {
            "sparsity": self.sparsity,
            "removed": self.removed,
            "size": self.size,
            "dense_metric": self.dense_metric,
            "pruned_metric": self.pruned_metric,
        }
        return json.dumps(derived | asdict(self), indent=2)

    def to_state(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return asdict(self)

    def table(self) -> str:
        """The report as text; drawn by rich where that is installed."""
        rows = [
            (
                layer.name,
                _shapes(layer),
                f"{layer.size:,}",
                *_share(layer.kept, layer.size),
            )
            for layer in self.layers
        ]
        known = all(layer.kept is not None for layer in self.layers)
        left = self.size - self.removed if known else None
        rows.append(("all", "", f"{self.size:,}", *_share(left, self.size)))
        return format_table(("layer", "shape", "weights", "kept", "kept %"), rows, 2) + "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"sparsity {self.sparsity:.2%}: {self.removed:,} of {self.size:,} weights removed"]
        if any(layer.kept is None for layer in self.layers):
            lines = [f"which of the {self.size:,} weights go, training steps will tell"]
        if self.monitor is not None:
            dense, pruned = (_number(value) for value in (self.dense_metric, self.pruned_metric))
            lines.append(f"{self.monitor}: dense {dense}, pruned {pruned}")
        if self.macs is None:
            lines.append(
                "multiply-adds not counted: no example that forward runs on was seen, or processes divide the"
                " parameters"
            )
        lines += self.decisions
        lines += self._masked() if self.dense is None else self._compacted(self.dense)
        lines += [f"{name} stays dense: {reason}" for name, reason in self.frozen.items()]
        lines += [f"{name} keeps a last unit, or it would be empty" for name in self.protected]
        if self.left_out:
            lines.append(f"{self.left_out} steps with inf or nan gradients were left out")
        return lines

    def _masked(self) -> list[str]:
        lines = [f"parameters {self.params:,}; bytes {self.bytes:,}", self._packed(), _NO_SPEED]
        if self.macs is not None and self.macs_kept is not None:
            lines.insert(0, f"multiply-adds {self.macs:,}, of which {self.macs_kept:,} with kept weights")
        return lines

    def _packed(self) -> str:
        return (
            f"bytes {self.bytes_packed:,} if saved with save_packed: one bit a masked weight, and what is kept"
        )

    def _compacted(self, dense: Cost) -> list[str]:
        pairs = [("parameters", dense.params, self.params), ("bytes", dense.bytes, self.bytes)]
        if dense.macs and self.macs:
            pairs.insert(0, ("multiply-adds", dense.macs, self.macs))
        lines = [
            f"{name}: dense {before:,}, compacted {after:,}: {before / after:.2f} times fewer"
            for name, before, after in pairs
        ]
        if self.bytes_packed < self.bytes:
            lines.append(self._packed())
        return lines + [
            f"latency of a batch of {size}: dense {1000 * dense.latency[size]:.3g} ms, compacted"
            f" {1000 * after:.3g} ms: {_speed(dense.latency[size] / after)}"
            for size, after in self.latency.items()
        ]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws sparsity and widths by layer, and sparsity and metric over time, into an image file.

        Raises:
            ImportError: Without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(18, max(4.0, 0.22 * len(self.layers))), layout="constrained")
        by_layer, widths, over_time = figure.subplots(1, 3)
        kept = [layer.size if layer.kept is None else layer.kept for layer in self.layers]
        removed = [1 - left / layer.size for left, layer in zip(kept, self.layers, strict=True)]
        draw_sparsity(by_layer, [layer.name for layer in self.layers], removed, self.sparsity)
        wide = {layer.name: layer for layer in self.layers if len(layer.shape) > 1}
        before = [layer.shape[0] for layer in wide.values()]
        after = [layer.shape[0] if layer.width is None else layer.width for layer in wide.values()]
        draw_widths(widths, list(wide), before, after)
        draw_history(
            over_time,
            [(entry.step, entry.sparsity) for entry in self.history],
            [(entry.step, entry.metric) for entry in self.history if entry.metric is not None],
            self.monitor,
        )
        figure.savefig(path, dpi=120)


def _shapes(layer: Layer) -> str:
    shapes = [layer.shape] if layer.compacted in (None, layer.shape) else [layer.shape, layer.compacted]
    return " > ".join("x".join(map(str, shape or ())) for shape in shapes)


def _share(kept: int | None, size: int) -> tuple[str, str]:
    return ("?", "?") if kept is None else (f"{kept:,}", f"{100 * kept / size:.2f}")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


# --- what saved ones look like

HISTORY_ENTRY = schema.dataclass_of(
    HistoryEntry,
    epoch=schema.integer(-1),
    step=schema.integer(),
    sparsity=schema.fraction,
    metric=schema.optional(schema.number()),
)
_SHAPE = schema.sequence(schema.integer())
_LAYER = schema.dataclass_of(
    Layer,
    name=schema.string,
    shape=_SHAPE,
    size=schema.integer(1),
    kept=schema.optional(schema.integer()),
    compacted=schema.optional(_SHAPE),
    width=schema.optional(schema.integer()),
)
REPORT = schema.satisfying(
    schema.dataclass_of(
        Report,
        layers=schema.sequence(_LAYER),
        params=schema.integer(1),
        bytes=schema.integer(1),
        bytes_packed=schema.integer(),
        macs=schema.optional(schema.integer()),
        macs_kept=schema.optional(schema.integer()),
        latency=LATENCY,
        dense=schema.optional(COST),
        frozen=schema.mapping(schema.string),
        protected=schema.sequence(schema.string),
        left_out=schema.integer(),
        monitor=schema.optional(schema.string),
        history=schema.sequence(HISTORY_ENTRY),
        decisions=schema.sequence(schema.string),
    ),
    lambda report: report.dense is None or report.latency.keys() <= report.dense.latency.keys(),
    "no more batch sizes than those of the dense network",
    ".latency",
)


def _speed(ratio: float) -> str:
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
