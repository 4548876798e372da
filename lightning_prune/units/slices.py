"""What one tensor gives to a group's units: single elements, slices along a dimension, or blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice(ABC):
    """One tensor's share in a group: which of its elements make each unit.

    Args:
        name: The tensor's name in ``named_parameters()`` or ``named_buffers()``.
        weight: The tensor.

    Attributes:
        divisible: Whether rows of the tensor are units that make a group of their own.
    """

    divisible: ClassVar[bool] = False

    name: str
    weight: Tensor

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the units."""

    @property
    def scalar(self) -> bool:
        """Whether it gives each unit a single number, as a bias or the scale of a norm does."""
        return self.weight.numel() == self.shape.numel()

    @abstractmethod
    def sum(self, elements: Tensor) -> Tensor:
        """Adds up what belongs to each unit.

        Args:
            elements: One number an element, of the weight's shape.

        Returns:
            One number a unit.
        """

    @abstractmethod
    def vectors(self, elements: Tensor) -> Tensor:
        """Lays out what belongs to each unit, in order.

        Args:
            elements: One number an element, of the weight's shape.

        Returns:
            One row a unit, filled up with zeros where others have more.
        """

    @abstractmethod
    def spread(self, units: Tensor) -> Tensor:
        """Gives each element what its unit has: the weight's shape, without a copy of that size."""

    def kept(self, mask: Tensor) -> Tensor:
        """Which units are there, given which elements are."""
        return self.sum(mask) > 0

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """What belongs to the rows ``start`` to ``stop`` of units, of a tensor of the weight's shape."""
        return tensor[start:stop] if self.divisible else tensor


@dataclass(frozen=True, eq=False)
class ElementSlice(Slice):
    """Each element is a unit of its own."""

    divisible = True

    @property
    def shape(self) -> torch.Size:
        """That of the weight."""
        return self.weight.shape

    def sum(self, elements: Tensor) -> Tensor:
        """They are the units."""
        return elements

    def vectors(self, elements: Tensor) -> Tensor:
        """One number each."""
        return elements.reshape(-1, 1)

    def spread(self, units: Tensor) -> Tensor:
        """They are the elements."""
        return units

    def kept(self, mask: Tensor) -> Tensor:
        """The mask itself, not a copy."""
        return mask


@dataclass(frozen=True, eq=False)
class AxisSlice(Slice):
    """Units lie along one dimension.

    Args:
        name: The tensor's name in ``named_parameters()`` or ``named_buffers()``.
        weight: The tensor.
        dim: The dimension along which units lie.
        index: For each place along ``dim`` the number of its unit, -1 where it belongs to none. ``None``:
            place ``i`` belongs to unit ``i``.
        scale: Whether the tensor is the scale of a batch norm.
        reads: Whether a contraction sums over the dimension: the units are inputs of the weight.
    """

    dim: int
    index: Tensor | None = None
    scale: bool = False
    reads: bool = False

    @property
    def shape(self) -> torch.Size:
        """One dimension."""
        if self.index is None:
            return self.weight.shape[self.dim :][:1]
        return torch.Size([int(self.index.max()) + 1])

    @property
    def scalar(self) -> bool:
        """Whether there is one number a place."""
        return self.weight.numel() == self.weight.shape[self.dim]

    def sum(self, elements: Tensor) -> Tensor:
        """Over all places of a unit."""
        # in order, unlike index_add_ on an accelerator: all processes find the same
        return self.vectors(elements).sum(1)

    def vectors(self, elements: Tensor) -> Tensor:
        """Its places one after the other."""
        rows = self._rows(elements)
        if self.index is None:
            return rows
        order = self.index.argsort(stable=True)[self.index.eq(-1).sum() :]
        unit = self.index[order]
        counts = unit.bincount(minlength=self.shape[0])
        rank = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit]
        laid_out = rows.new_zeros(self.shape[0], int(counts.max()), rows.shape[1])
        laid_out[unit, rank] = rows[order]
        return laid_out.flatten(1)

    def places(self, units: Tensor) -> Tensor:
        """For each place along ``dim`` what its unit has, True where it belongs to none."""
        if self.index is None:
            return units
        return torch.cat([units, units.new_ones(1)])[self.index]

    def spread(self, units: Tensor) -> Tensor:
        """The same for all that lies at one place."""
        last = self.weight.ndim - 1 - self.dim
        return self.places(units).view(-1, *(1 for _ in range(last))).expand(self.weight.shape)

    def _rows(self, elements: Tensor) -> Tensor:
        return elements.movedim(self.dim, 0).reshape(elements.shape[self.dim], -1)


@dataclass(frozen=True, eq=False)
class BlockSlice(Slice):
    """Blocks of ``height`` x ``width`` along the first two dimensions, whole along the others.

    Args:
        name: The tensor's name in ``named_parameters()``.
        weight: The tensor; its first two dimensions are multiples of the block's.
        height: Places of a block along the first dimension.
        width: Places of a block along the second one.
    """

    height: int
    width: int

    @property
    def shape(self) -> torch.Size:
        """Two dimensions."""
        return torch.Size([self.weight.shape[0] // self.height, self.weight.shape[1] // self.width])

    def sum(self, elements: Tensor) -> Tensor:
        """Over each block."""
        return self._blocks(elements).sum(2)

    def vectors(self, elements: Tensor) -> Tensor:
        """Row by row."""
        return self._blocks(elements).flatten(0, 1)

    def spread(self, units: Tensor) -> Tensor:
        """The same for all of a block."""
        plane = units.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        return plane.view(*plane.shape, *(1 for _ in self.weight.shape[2:])).expand(self.weight.shape)

    def _blocks(self, elements: Tensor) -> Tensor:
        rows, columns = self.shape
        return elements.reshape(rows, self.height, columns, self.width, -1).transpose(1, 2).flatten(2)


def axis_slices(parts: Iterable[Slice]) -> list[AxisSlice]:
    """Those that lie along a dimension: what can be cut out."""
    return [part for part in parts if isinstance(part, AxisSlice)]
