"""Slices of a tensor: which of its elements make up each unit, as elements, along a dimension or as blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice(ABC):
    """The part of each unit of a group that lies in one tensor.

    Args:
        name: The tensor's name in ``named_parameters()`` or ``named_buffers()``.
        weight: The tensor.

    Attributes:
        divisible: Whether a subset of the tensor's rows makes up units of a group of its own.
        spans: Whether each unit of the group has elements in the tensor.
    """

    divisible: ClassVar[bool] = False
    spans: ClassVar[bool] = True

    name: str
    weight: Tensor

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the tensor of units."""

    @property
    def scalar(self) -> bool:
        """Whether each unit has a single number in this tensor, as in a bias or the scale of a norm."""
        return self.weight.numel() == self.shape.numel()

    def sum(self, elements: Tensor) -> Tensor:
        """Return the sum of the elements of each unit.

        Args:
            elements: One number an element, of the weight's shape.

        Returns:
            One number a unit, of ``shape``.
        """
        # index_add_ on an accelerator adds in an order that varies; this sum is the same in all processes
        return self.vectors(elements).sum(1).view(self.shape)

    @abstractmethod
    def vectors(self, elements: Tensor) -> Tensor:
        """Return the elements of each unit as one row, in order.

        Args:
            elements: One number an element, of the weight's shape.

        Returns:
            A matrix with one row a unit. Rows of units with fewer elements are padded with zeros.
        """

    @abstractmethod
    def spread(self, units: Tensor) -> Tensor:
        """Return for each element the value of its unit.

        Args:
            units: One value a unit, of ``shape``.

        Returns:
            A tensor of the weight's shape, expanded without a copy of that size where possible.
        """

    def kept(self, mask: Tensor) -> Tensor:
        """Return which units are kept: those with at least one kept element.

        Args:
            mask: Bool, of the weight's shape, True where an element is kept.
        """
        return self.sum(mask) > 0

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Return the part of a tensor that belongs to some rows of units.

        Args:
            tensor: A tensor of the weight's shape.
            start: The first row.
            stop: One past the last row.

        Returns:
            These rows of the tensor; the whole tensor if the slice is not ``divisible``.
        """
        return tensor[start:stop] if self.divisible else tensor


@dataclass(frozen=True, eq=False)
class ElementSlice(Slice):
    """A slice in which each element is a unit of its own."""

    divisible = True

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.weight.shape

    def sum(self, elements: Tensor) -> Tensor:
        """Return the elements themselves."""
        return elements

    def vectors(self, elements: Tensor) -> Tensor:
        """Return a matrix of one column."""
        return elements.reshape(-1, 1)

    def spread(self, units: Tensor) -> Tensor:
        """Return the units themselves, not a copy."""
        return units

    def kept(self, mask: Tensor) -> Tensor:
        """Return the mask itself, not a copy."""
        return mask


@dataclass(frozen=True, eq=False)
class AxisSlice(Slice):
    """A slice whose units lie along one dimension.

    Args:
        name: The tensor's name in ``named_parameters()`` or ``named_buffers()``.
        weight: The tensor.
        dim: The dimension along which units lie, counted from 0.
        index: Int tensor with the unit number of each index along ``dim``, -1 for an index without a unit.
            ``None`` if index ``i`` belongs to unit ``i``.
        scale: Whether the tensor is the scale of a batch norm.
        reads: Whether an op sums over the dimension, so that the units are inputs of the weight.
    """

    dim: int
    index: Tensor | None = None
    scale: bool = False
    reads: bool = False

    @property
    def shape(self) -> torch.Size:
        """Number of units, as a shape of one dimension."""
        if self.index is None:
            return torch.Size([self.weight.shape[self.dim]])
        return torch.Size([int(self.index.max()) + 1])

    @property
    def scalar(self) -> bool:
        """Whether the tensor holds one number for each index along ``dim``."""
        return self.weight.numel() == self.weight.shape[self.dim]

    def sum(self, elements: Tensor) -> Tensor:
        """Return the sum of the elements of each unit: those of each index first, which is a single pass."""
        others = [dim for dim in range(elements.ndim) if dim != self.dim]
        return self._by_unit((elements.sum(others) if others else elements)[:, None]).sum(1)

    def vectors(self, elements: Tensor) -> Tensor:
        """Return the elements at all indices of each unit as one row, in the order of the indices."""
        return self._by_unit(elements.movedim(self.dim, 0).reshape(elements.shape[self.dim], -1))

    def _by_unit(self, rows: Tensor) -> Tensor:
        """Return the rows of all indices of each unit as one row, padded with zeros."""
        if self.index is None:
            return rows
        order = self.index.argsort(stable=True)[self.index.eq(-1).sum() :]
        unit = self.index[order]
        size = self.shape[0]
        counts = unit.bincount(minlength=size)
        most = int(counts.max())
        if most == 1 and len(order) == size:
            return rows[order]
        rank = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit]
        laid_out = rows.new_zeros(size, most, rows.shape[1])
        laid_out[unit, rank] = rows[order]
        return laid_out.flatten(1)

    def kept(self, mask: Tensor) -> Tensor:
        """Return which units are kept: those with at least one kept element."""
        rows = mask.movedim(self.dim, 0).flatten(1).any(1) if mask.ndim > 1 else mask
        if self.index is None:
            return rows
        units = rows.new_zeros(self.shape)
        units[self.index[rows & (self.index >= 0)]] = True
        return units

    def places(self, units: Tensor) -> Tensor:
        """Return for each index along ``dim`` the value of its unit.

        Args:
            units: One value a unit.

        Returns:
            One value an index; 1 (True) where an index belongs to no unit.
        """
        if self.index is None:
            return units
        return torch.cat([units, units.new_ones(1)])[self.index.to(units.device)]

    def units_left(self, kept: Tensor) -> Tensor:
        """Return the numbers of the units that a cut leaves, in ascending order.

        Args:
            kept: The indices along ``dim`` that it leaves.
        """
        index = kept if self.index is None else self.index[kept.to(self.index.device)].cpu()
        units: Tensor = index[index >= 0].unique()
        return units

    def narrowed(self, kept: Tensor, units: Tensor) -> AxisSlice:
        """Return the slice after a cut of its tensor.

        Args:
            kept: The indices along ``dim`` that it leaves.
            units: The numbers of the units that it leaves, which are counted anew, in ascending order.
        """
        index = kept if self.index is None else self.index[kept.to(self.index.device)]
        numbers = torch.full((int(units[-1]) + 2,), -1)  # the last one stands for no unit
        numbers[units] = torch.arange(len(units))
        return replace(self, index=numbers.to(index.device)[index])

    def spread(self, units: Tensor) -> Tensor:
        """Return for each element the value at its index along ``dim``, as :meth:`places` gives it."""
        last = self.weight.ndim - 1 - self.dim
        return self.places(units).view(-1, *(1 for _ in range(last))).expand(self.weight.shape)


@dataclass(frozen=True, eq=False)
class WholeSlice(AxisSlice):
    """A tensor that is a part of one unit alone; the other units lie in other tensors.

    Args:
        name: The tensor's name in ``named_parameters()``.
        weight: The tensor, of at least one dimension.
        dim: 0: a tensor whose unit goes is cut to no rows.
        unit: Number of the unit.
        count: Number of units in the group.
    """

    spans = False

    unit: int = 0
    count: int = 1

    @property
    def shape(self) -> torch.Size:
        """Number of units, as a shape of one dimension."""
        return torch.Size([self.count])

    def sum(self, elements: Tensor) -> Tensor:
        """Return the sum of the elements at the place of their unit, and 0 for the others."""
        total = elements.sum()
        units = total.new_zeros(self.count)
        units[self.unit] = total
        return units

    def kept(self, mask: Tensor) -> Tensor:
        """Return True for the unit of the tensor if it has a kept element, and False for the others."""
        units = mask.new_zeros(self.count)
        units[self.unit] = mask.any()
        return units

    def vectors(self, elements: Tensor) -> Tensor:
        """Return the elements as the row of their unit; the rows of the others are zeros."""
        rows = elements.new_zeros(self.count, elements.numel())
        rows[self.unit] = elements.flatten()
        return rows

    def places(self, units: Tensor) -> Tensor:
        """Return for each row the value of the tensor's unit."""
        return units[self.unit].expand(len(self.weight))

    def units_left(self, kept: Tensor) -> Tensor:
        """Return the number of the unit, unless the cut leaves no row."""
        return torch.tensor([self.unit] if len(kept) else [], dtype=torch.int64)

    def narrowed(self, kept: Tensor, units: Tensor) -> AxisSlice:
        """Return the slice with the new number of its unit, which the cut leaves."""
        return replace(self, unit=units.tolist().index(self.unit), count=len(units))


@dataclass(frozen=True, eq=False)
class BlockSlice(Slice):
    """A slice into blocks of ``height`` x ``width`` along the first two dimensions, whole along the others.

    Args:
        name: The tensor's name in ``named_parameters()``.
        weight: The tensor; its first two dimensions are multiples of the block's.
        height: Size of a block along the first dimension.
        width: Size of a block along the second dimension.
    """

    height: int
    width: int

    @property
    def shape(self) -> torch.Size:
        """Number of blocks along each of the first two dimensions."""
        return torch.Size([self.weight.shape[0] // self.height, self.weight.shape[1] // self.width])

    def vectors(self, elements: Tensor) -> Tensor:
        """Return the elements of each block as one row; blocks, and elements in a block, in row-major order."""
        rows, columns = self.shape
        blocks = elements.reshape(rows, self.height, columns, self.width, -1).transpose(1, 2)
        return blocks.flatten(2).flatten(0, 1)

    def spread(self, units: Tensor) -> Tensor:
        """Return for each element the value of its block."""
        plane = units.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        return plane.view(*plane.shape, *(1 for _ in self.weight.shape[2:])).expand(self.weight.shape)


def axis_slices(parts: Iterable[Slice]) -> list[AxisSlice]:
    """Return the slices whose units lie along a dimension, and so can be cut out of their tensor."""
    return [part for part in parts if isinstance(part, AxisSlice)]
