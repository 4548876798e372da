"""The report of a pruned model: its numbers, its history, and its forms as table, plot, page and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from lightning_prune.channels.compaction.proof import PROOF, Proof
from lightning_prune.channels.latency.target import LATENCY_TARGET, LatencyTarget
from lightning_prune.core import schema
from lightning_prune.report.comparison import Comparison
from lightning_prune.report.cost import COST, LATENCY, Cost
from lightning_prune.report.entries import HISTORY_ENTRY, LAYER, HistoryEntry, Layer, dense_metric, last_metric
from lightning_prune.report.html import Section, Share, page
from lightning_prune.report.plots import draw_history, draw_sparsity, draw_widths, layer_figure
from lightning_prune.report.tables import format_table

_NO_SPEED = (
    "Zeros alone make nothing faster: the dense network still runs. They shrink a packed file, and speed up"
    " sparse kernels."
)
_MOST_NAMES = 4  # that a line of the table gives


@dataclass(frozen=True)
class Report:
    """The state of a pruned model, and the history of its pruning.

    Args:
        layers: The parameters that the structure covers.
        params: Number of parameters, zeros included.
        bytes: Bytes of all parameters and buffers, stored densely.
        bytes_packed: Bytes of the file that ``save_packed`` writes, apart from some hundred bytes per tensor. A
            masked parameter takes one bit per weight and its kept values, if that is less than all its values.
        macs: Multiply-adds of a forward pass of one example, zeros included (half the count of
            ``torch.utils.flop_counter``, and recurrent layers); ``None`` without an example.
        macs_kept: Multiply-adds with kept weights only, as in an ideal sparse kernel; ``None`` if not counted.
            Products of several parameters, and of none, count as kept.
        latency: Batch size, 1 and the whole batch, to seconds of a forward pass; without those on which
            ``forward`` fails or for which the time limit left no time.
        latency_target: The target in measured time, and how near the network is to it; ``None`` without one.
        dense: Costs of the model before compaction; ``None`` if it is not compacted.
        frozen: Name of each parameter or group that is not pruned to the reason.
        protected: Names of groups of which more would have been removed, and that keep as few as they may.
        left_out: Number of training steps left out of the statistics because of inf or nan gradients.
        unreconstructed: Name of each masked matrix that the last reconstruction left as it was, to the reason.
        proof: How near the outputs of the compacted model are to those of the masked one; ``None`` if it is not
            compacted.
        unchanged: Whole numbers that modules keep, and that compaction left alone, although they equal a width
            that changed: code that no example runs may use them as sizes.
        monitor: Name of the monitored metric.
        history: Pruning events and measurements of the metric, in order.
        decisions: Descriptions of what a guard decided, in order.
    """

    layers: tuple[Layer, ...]
    params: int
    bytes: int
    bytes_packed: int
    macs: int | None = None
    macs_kept: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)
    latency_target: LatencyTarget | None = None
    dense: Cost | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    left_out: int = 0
    unreconstructed: Mapping[str, str] = field(default_factory=dict)
    proof: Proof | None = None
    unchanged: tuple[str, ...] = ()
    monitor: str | None = None
    history: tuple[HistoryEntry, ...] = ()
    decisions: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements (weights) that the structure covers."""
        return sum(layer.size for layer in self.layers)

    @property
    def removed(self) -> int:
        """Number of removed elements, where it is known."""
        return sum(layer.size - layer.remaining for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Removed share of the elements that the structure covers; 0 if it covers none."""
        return self.removed / self.size if self.size else 0.0

    @property
    def dense_metric(self) -> float | None:
        """The last value of the metric before the first removal, ``None`` if there is none."""
        return dense_metric(self.history)

    @property
    def pruned_metric(self) -> float | None:
        """The last value of the metric at the present sparsity, ``None`` if there is none."""
        return last_metric(event for event in self.history if event.sparsity == self.sparsity)

    def to_json(self) -> str:
        """Return all fields and derived numbers as JSON; ``"sparsity"`` is the same as :attr:`sparsity`."""
        derived = ("sparsity", "removed", "size", "dense_metric", "pruned_metric")
        return json.dumps({name: getattr(self, name) for name in derived} | asdict(self), indent=2)

    def to_state(self) -> dict[str, Any]:
        """Return the fields as plain values, for checkpoints; the ``REPORT`` schema reads them."""
        return asdict(self)

    def table(self) -> str:
        """Return the report as text; its table is drawn by rich if that is installed."""
        rows = [
            (layer.name, _shapes(layer), f"{layer.size:,}", *_share(layer.kept, layer.size))
            for layer in self.layers
        ]
        known = all(layer.kept is not None for layer in self.layers)
        left = self.size - self.removed if known else None
        rows.append(("all", "", f"{self.size:,}", *_share(left, self.size)))
        return format_table(("layer", "shape", "weights", "kept", "kept %"), rows, 2) + "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [*self._summary(), *self.decisions]
        lines += _by_reason(self.frozen, "stays dense", "stay dense")
        lines += _by_reason(self.unreconstructed, "was not reconstructed", "were not reconstructed")
        return lines + [
            f"{name} keeps as few as it may: more would have been removed" for name in self.protected
        ]

    def _summary(self) -> list[str]:
        """Return what concerns the whole network."""
        params = self.params if self.dense is None else self.dense.params
        lines = [f"sparsity {self.sparsity:.2%}: {self.removed:,} of {self.size:,} weights removed"]
        if any(layer.kept is None for layer in self.layers):
            lines = [f"which of the {self.size:,} weights go, training steps will tell"]
        share = self.size / max(1, params)
        lines.append(f"these {self.size:,} are {share:.1%} of the network's {params:,} parameters")
        if self.monitor is not None:
            dense, pruned = (_number(value) for value in (self.dense_metric, self.pruned_metric))
            lines.append(f"{self.monitor}: dense {dense}, pruned {pruned}")
        if self.macs is None:
            lines.append(
                "multiply-adds not counted: no example that forward runs on was seen, or processes divide the"
                " parameters"
            )
        lines += self._masked() if self.dense is None else self._compacted(self.dense)
        lines += [str(each) for each in (self.latency_target, self.proof) if each is not None]
        lines += [
            f"{number} was left alone, although a width of that size changed" for number in self.unchanged
        ]
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

    def to_html(self) -> str:
        """Return the report as a page: one HTML file that opens offline, with a field that searches it."""
        rows = [
            (layer.name, _shapes(layer), layer.size, layer.kept, _gone(layer), layer.full_width, layer.width)
            for layer in self.layers
        ]
        events = [(entry.epoch, entry.step, Share(entry.sparsity), entry.metric) for entry in self.history]
        names = ("name", "reason")
        metric = self.monitor or "metric"
        return page(
            "Pruning report",
            [
                Section("The network", lines=self._summary()),
                Section(
                    "Layers",
                    head=("layer", "shape", "weights", "kept", "removed", "width before", "width after"),
                    rows=rows,
                ),
                Section("Decisions", lines=self.decisions),
                Section("Not pruned", head=names, rows=list(self.frozen.items())),
                Section("Not reconstructed", head=names, rows=list(self.unreconstructed.items())),
                Section("As few as they may: more would have been removed", lines=self.protected),
                Section(
                    "History",
                    curves=self._curves(metric),
                    head=("epoch", "step", "sparsity", metric),
                    rows=events,
                ),
            ],
        )

    def _curves(self, metric: str) -> dict[str, list[tuple[float, float]]]:
        """Return the finite points (step, value) of sparsity and metric, without curves that have none."""
        values: dict[str, list[tuple[float, float | None]]] = {
            "sparsity": [(entry.step, entry.sparsity) for entry in self.history],
            metric: [(entry.step, entry.metric) for entry in self.history],
        }
        curves = {
            name: [(step, value) for step, value in points if value is not None and math.isfinite(value)]
            for name, points in values.items()
        }
        return {name: points for name, points in curves.items() if points}

    def compare(self, other: Report) -> Comparison:
        """Return the numbers of this report and of another one side by side; printed, they are a table.

        Args:
            other: The report of another network, or of the same at another time. Layers match by name.

        >>> from lightning_prune import measure
        >>> from torch import nn
        >>> small, large = nn.Linear(2, 3), nn.Linear(2, 4)
        >>> measure(small).compare(measure(large)).numbers["parameters"]
        (9, 12)
        """
        ours, theirs = self._numbers(), other._numbers()
        here, there = ({layer.name: layer.remaining_width for layer in each.layers} for each in (self, other))
        return Comparison(
            {name: (ours.get(name), theirs.get(name)) for name in ours | theirs},
            {name: (here.get(name), there.get(name)) for name in here | there},
        )

    def _numbers(self) -> dict[str, float | None]:
        """Return what two reports are compared by."""
        return {
            "sparsity": self.sparsity,
            "weights covered": self.size,
            "weights removed": self.removed,
            "parameters": self.params,
            "multiply-adds": self.macs,
            "multiply-adds with kept weights": self.macs_kept,
            "bytes": self.bytes,
            "bytes packed": self.bytes_packed,
            self.monitor or "metric": self.pruned_metric,
            **{f"seconds of a batch of {size}": seconds for size, seconds in self.latency.items()},
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Plot sparsity and metric over time, and sparsity and widths by layer, to an image file.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        names = [layer.name for layer in self.layers]
        figure, over_time, by_layer, widths = layer_figure(len(names), over_time=bool(self.history))
        removed = [1 - layer.remaining / layer.size for layer in self.layers]
        draw_sparsity(by_layer, names, removed, self.sparsity)
        before = [layer.full_width for layer in self.layers]
        draw_widths(widths, names, before, [layer.remaining_width for layer in self.layers])
        if over_time is not None:
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


def _gone(layer: Layer) -> Share | None:
    return None if layer.kept is None else Share(1 - layer.kept / max(1, layer.size))


def _share(kept: int | None, size: int) -> tuple[str, str]:
    return ("?", "?") if kept is None else (f"{kept:,}", f"{100 * kept / max(1, size):.2f}")


def _by_reason(reasons: Mapping[str, str], one: str, several: str) -> list[str]:
    """Return a line for each reason, with the names that have it, of which the first ones are given.

    Args:
        reasons: Name to reason.
        one: What the line says of one name.
        several: What it says of several.
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reasons.get(name.rpartition(".")[0]) != reason:  # its module says the same
            names.setdefault(reason, []).append(name)
    lines = []
    for reason, same in names.items():
        shown = ", ".join(same[:_MOST_NAMES])
        more = f" and {len(same) - _MOST_NAMES} more" if len(same) > _MOST_NAMES else ""
        lines.append(f"{shown}{more} {one if len(same) == 1 else several}: {reason}")
    return lines


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _speed(ratio: float) -> str:
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


# --- schema of saved reports

REPORT = schema.satisfying(
    schema.dataclass_of(
        Report,
        layers=schema.sequence(LAYER),
        params=schema.integer(1),
        bytes=schema.integer(1),
        bytes_packed=schema.integer(),
        macs=schema.optional(schema.integer()),
        macs_kept=schema.optional(schema.integer()),
        latency=LATENCY,
        latency_target=schema.optional(LATENCY_TARGET),
        dense=schema.optional(COST),
        frozen=schema.mapping(schema.string),
        protected=schema.sequence(schema.string),
        left_out=schema.integer(),
        unreconstructed=schema.mapping(schema.string),
        proof=schema.optional(PROOF),
        unchanged=schema.sequence(schema.string),
        monitor=schema.optional(schema.string),
        history=schema.sequence(HISTORY_ENTRY),
        decisions=schema.sequence(schema.string),
    ),
    lambda report: report.dense is None or report.latency.keys() <= report.dense.latency.keys(),
    "no more batch sizes than those of the dense network",
    ".latency",
)
