"""The target in measured time: what was wanted, what the table says, and what was measured in the end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core import schema

MET = 0.05  # the largest difference to the time that was wanted, as a share of it


@dataclass(frozen=True)
class LatencyTarget:
    """A target in measured time, and how near the network is to it. Times are shares of the dense network's.

    Args:
        batch: The batch size.
        wanted: The time that is to be left at the end.
        expected: The time that is left now, by the table.
        machine: The machine that the table is of.
        error: How far the table is from the networks that it was measured on, as a share.
        measured: The time of the compacted network, measured in turn with the dense one; ``None`` without.
        measured_on: The machine of that measurement; ``None`` without one.
    """

    batch: int
    wanted: float
    expected: float
    machine: str
    error: float
    measured: float | None = None
    measured_on: str | None = None

    @classmethod
    def of(cls, table: LatencyTable, share: float, expected: float) -> LatencyTarget:
        """Return the target of a share of the time to remove, with a table and the time that is left by it."""
        return cls(table.batch, 1 - share, expected, table.machine, table.error)

    def met_by(self, measured: float, machine: str) -> LatencyTarget:
        """Return the target with the time that was measured in the end, and the machine."""
        return replace(self, measured=measured, measured_on=machine)

    @property
    def missed(self) -> float | None:
        """How much longer than wanted the network takes, as a share of what was wanted; ``None`` if unknown."""
        return None if self.measured is None else self.measured / self.wanted - 1

    def __str__(self) -> str:
        wanted = f"time of a batch of {self.batch}: {self.wanted:.1%} of the dense network's wanted"
        table = f"{self.expected:.1%} by the table of {self.machine}"
        if self.missed is None:
            return f"{wanted}, {table}"
        line = f"{wanted}, {self.measured:.1%} measured in turn, {table}"
        if abs(self.missed) <= MET:
            return f"{line}: met to within {MET:.0%}"
        more = "more" if self.missed > 0 else "less"
        return f"{line}: {abs(self.missed):.1%} {more} than wanted, because {self._why()}"

    def _why(self) -> str:
        if abs(self.expected / self.wanted - 1) > MET:
            return "whole units, their multiples and least numbers, or events that are left, do not give it"
        if self.measured_on != self.machine:
            return f"it was measured on another machine, {self.measured_on}"
        return (
            f"the table is {self.error:.1%} (median) from the networks that it was measured on, or the machine"
            " was busy: measure again with nothing else running"
        )


_SHARE = schema.number("a share of at least 0", lambda value: value >= 0)
LATENCY_TARGET = schema.dataclass_of(
    LatencyTarget,
    batch=schema.integer(1),
    wanted=schema.number("a number above 0", lambda value: value > 0),
    expected=_SHARE,
    machine=schema.string,
    error=_SHARE,
    measured=schema.optional(_SHARE),
    measured_on=schema.optional(schema.string),
)
