"""What a network costs as a function of the units that stay: for each tensor or op a product of shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor, and the units that its places belong to.

    Args:
        size: Number of places.
        fixed: How many of them belong to no unit.
        parts: Group name and, for each of the other places, the number of its unit; ``None`` for a group whose
            units are all the places.
    """

    size: int
    fixed: int
    parts: tuple[tuple[str, Tensor | None], ...]

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """Which share of the places stays."""
        stays = self.fixed
        for name, index in self.parts:
            units = kept[name]
            stays += int((units if index is None else units[index]).count_nonzero())
        return stays / self.size

    def within(self, names: Collection[str]) -> Axis:
        """The same, if units of other groups stay for good."""
        gone = [index for name, index in self.parts if name not in names]
        fixed = self.fixed + sum(self.size if index is None else len(index) for index in gone)
        return replace(self, fixed=fixed, parts=tuple(part for part in self.parts if part[0] in names))


@dataclass(frozen=True, eq=False)
class Term:
    """What one tensor or op costs: the amount, times the share that stays along each line."""

    amount: int
    lines: tuple[Axis, ...]


class Budget:
    """A sum of terms.

    Args:
        terms: Of the whole network, with what no unit changes.

    >>> line = Line(4, 0, (("layer", torch.arange(4)),))
    >>> budget = Budget([Term(12, (line,)), Term(4, ())])
    >>> budget.total, budget.cost({"layer": torch.tensor([True, False, False, True])})
    (16, 10.0)
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = [term for term in terms if term.lines]
        self._constant = sum(term.amount for term in terms if not term.lines)
        # many ops run over the same line: its share is worked out once
        self._lines = list({id(line): line for term in self._terms for line in term.lines}.values())
        self._amounts = torch.tensor([float(term.amount) for term in self._terms], dtype=torch.float64)
        place = {id(line): number for number, line in enumerate(self._lines)}
        most = max((len(term.lines) for term in self._terms), default=0)
        rows = [[place[id(line)] for line in term.lines] for term in self._terms]
        whole = len(self._lines)  # a line of which all stays
        self._factors = torch.tensor([row + [whole] * (most - len(row)) for row in rows], dtype=torch.int64)

    @property
    def total(self) -> int:
        """The cost of the whole network."""
        return self._constant + sum(term.amount for term in self._terms)

    def cost(self, kept: Mapping[str, Tensor]) -> float:
        """What is left of it.

        Args:
            kept: Group name to a bool a unit, True where it stays.
        """
        if not self._terms:
            return float(self._constant)
        shares = torch.tensor([line.share(kept) for line in self._lines] + [1.0], dtype=torch.float64)
        return self._constant + float(self._amounts @ shares[self._factors].prod(1))

    def within(self, names: Collection[str]) -> Budget:
        """The same network, if only units of these groups may go."""
        lines = {id(line): line.within(names) for line in self._lines}
        terms = [replace(term, lines=tuple(lines[id(line)] for line in term.lines)) for term in self._terms]
        return Budget([*terms, Term(self._constant, ())])
