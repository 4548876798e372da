"""Two reports side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeAlias

from lightning_prune.report.tables import format_table

Pair: TypeAlias = tuple[float | None, float | None]


@dataclass(frozen=True)
class Comparison:
    """The numbers of two reports, side by side. Printed, it is its :meth:`table`.

    Args:
        numbers: Name of each number to its value in the one and in the other report, ``None`` where it was not
            measured. Latencies are in seconds.
        widths: Name of each layer to its number of filters or neurons with a kept weight in the one and in the
            other report, ``None`` where the report does not have the layer.
    """

    numbers: Mapping[str, Pair]
    widths: Mapping[str, Pair]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return the numbers as a text table; the difference is the other less this."""
        named = {**self.numbers, **{f"width of {name}": pair for name, pair in self.widths.items()}}
        rows = [(name, *map(_text, pair), *_change(*pair)) for name, pair in named.items()]
        return format_table(("", "this", "other", "difference", "other / this"), rows, 1)

    def to_json(self) -> str:
        """Return all numbers as JSON."""
        return json.dumps(asdict(self), indent=2)


def _text(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.6g}"


def _change(this: float | None, other: float | None) -> tuple[str, str]:
    """Return the difference and the ratio of two numbers as text."""
    if this is None or other is None:
        return "-", "-"
    return _text(other - this, "+"), f"{other / this:.3f}" if this else "-"
