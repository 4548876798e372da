"""The cost of a network as a function of the units that are kept; parameters and multiply-adds as sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class CostFunction(Protocol):
    """The cost of a network as a function of the units that are kept. Fewer units never cost more."""

    @property
    def total(self) -> float:
        """The cost of the whole network, with all units kept."""

    def cost(self, kept: Mapping[str, Tensor]) -> float:
        """Return the cost of the network without the removed units.

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
        """

    def within(self, names: Collection[str]) -> CostFunction:
        """Return the cost of the same network, if only units of the groups ``names`` can be removed."""

    def own(self, names: Collection[str]) -> CostFunction:
        """Return the cost of what the groups ``names`` shorten, all other units kept."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor or op, or all its elements in a row, with the unit that each index belongs to.

    Args:
        size: Number of indices along the dimension.
        fixed: How many of these indices belong to no unit, and so are always kept.
        parts: Pairs of a group name and an int tensor with one unit number for each of the other indices;
            ``None`` instead of the tensor if the group has exactly one unit for each index of the axis.
    """

    size: int
    fixed: int
    parts: tuple[tuple[str, Tensor | None], ...]

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """Return the share of the indices that is kept, in [0, 1].

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
        """
        count = self.fixed
        for name, index in self.parts:
            units = kept[name]
            count += int((units if index is None else units[index]).count_nonzero())
        return count / self.size

    def within(self, names: Collection[str]) -> Axis:
        """Return this axis with the indices of all groups but ``names`` made fixed, so that they are kept."""
        others = [index for name, index in self.parts if name not in names]
        fixed = self.fixed + sum(self.size if index is None else len(index) for index in others)
        return replace(self, fixed=fixed, parts=tuple(part for part in self.parts if part[0] in names))


@dataclass(frozen=True, eq=False)
class Term:
    """The cost of one tensor or op: the amount, times the kept share along each of its axes.

    Args:
        amount: The cost of the whole tensor or op.
        lines: The axes that units can shorten. Without any, the cost is constant.
    """

    amount: int
    lines: tuple[Axis, ...]


class Budget:
    """The cost of a network as a sum of terms.

    Args:
        terms: One for each tensor or op of the whole network, constant ones included.

    >>> axis = Axis(4, 0, (("layer", torch.arange(4)),))
    >>> budget = Budget([Term(12, (axis,)), Term(4, ())])
    >>> budget.total, budget.cost({"layer": torch.tensor([True, False, False, True])})
    (16, 10.0)
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = [term for term in terms if term.lines]
        self._constant = sum(term.amount for term in terms if not term.lines)
        # Many terms share an axis, so the kept share of each distinct axis is computed once.
        self._axes = list({id(axis): axis for term in self._terms for axis in term.lines}.values())
        self._amounts = torch.tensor([float(term.amount) for term in self._terms], dtype=torch.float64)
        number = {id(axis): number for number, axis in enumerate(self._axes)}
        rows = [[number[id(axis)] for axis in term.lines] for term in self._terms]
        longest = max(map(len, rows), default=0)
        whole = len(self._axes)  # index of a constant share of 1.0, which pads shorter rows
        self._factors = torch.tensor([row + [whole] * (longest - len(row)) for row in rows], dtype=torch.int64)

    @property
    def total(self) -> int:
        """The cost of the whole network, with all units kept."""
        return self._constant + sum(term.amount for term in self._terms)

    def cost(self, kept: Mapping[str, Tensor]) -> float:
        """Return the cost of the network without the removed units.

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
        """
        if not self._terms:
            return float(self._constant)
        shares = torch.tensor([axis.share(kept) for axis in self._axes] + [1.0], dtype=torch.float64)
        return self._constant + float(self._amounts @ shares[self._factors].prod(1))

    def plus(self, amount: int) -> Budget:
        """Return the budget of a network that costs this much more, whatever is removed."""
        return Budget([*self._terms, Term(self._constant + amount, ())])

    def within(self, names: Collection[str]) -> Budget:
        """Return the budget of the same network, if only units of the groups ``names`` can be removed."""
        axes = {id(axis): axis.within(names) for axis in self._axes}
        terms = [replace(term, lines=tuple(axes[id(axis)] for axis in term.lines)) for term in self._terms]
        return Budget([*terms, Term(self._constant, ())])

    def own(self, names: Collection[str]) -> Budget:
        """Return the cost of the tensors or ops that the groups ``names`` shorten, all other units kept."""
        inner = self.within(names)
        return Budget([term for term in inner._terms if any(axis.parts for axis in term.lines)])
