"""A unit group: the parameter slices whose units live or die together, and compete with each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.budgets import Budget


@dataclass(frozen=True, eq=False)
class Share(ABC):
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
class Elements(Share):
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
class Slice(Share):
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
        places = self._rows(elements).sum(1)
        if self.index is None:
            return places
        sums = places.new_zeros(self.shape[0] + 1)  # the last takes in what belongs to no unit
        return sums.index_add_(0, self.index % len(sums), places)[:-1]

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


def along(parts: Iterable[Share]) -> list[Slice]:
    """Those that lie along a dimension: what can be cut out."""
    return [part for part in parts if isinstance(part, Slice)]


@dataclass(frozen=True, eq=False)
class Tiles(Share):
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


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that compete with each other: a layer's weights, or the channels that layers share.

    Args:
        name: Of the group, for people; unique in a model.
        slices: Which elements of which parameters make each unit, and its score; all of one unit shape.
        followers: What is masked along with a unit, and does not count in its score.
        buffers: What goes along with a unit when it is cut out.
        input_dim: The dimension of ``shape`` that runs over a layer's inputs, if there is one.
        minimum: How many units stay at least.
        multiple: Of what the number of units that stay is a multiple, unless all stay.
        attributes: Module and attribute names of whole numbers that shrink with the number of units.
        heads: Whether its units are attention heads.
    """

    name: str
    slices: tuple[Share, ...]
    followers: tuple[Share, ...] = ()
    buffers: tuple[Share, ...] = ()
    input_dim: int | None = None
    minimum: int = 1
    multiple: int = 1
    attributes: tuple[tuple[str, str], ...] = ()
    heads: bool = False

    @property
    def masked(self) -> tuple[Share, ...]:
        """All that is 0 where a unit is gone."""
        return self.slices + self.followers

    @property
    def shape(self) -> torch.Size:
        """Shape of the units, and so of scores and of what is kept."""
        return self.slices[0].shape

    @property
    def size(self) -> int:
        """Number of units."""
        return self.shape.numel()

    @property
    def least(self) -> int:
        """The smallest number of units that may stay."""
        return min(self.size, -(-max(1, self.minimum) // self.multiple) * self.multiple)

    def width(self, count: int) -> int:
        """The number of units nearest to ``count`` that may stay; of two the larger."""
        if self.multiple == 1:
            return max(count, self.least)
        below = max(count // self.multiple * self.multiple, self.least)
        above = min(below + self.multiple, self.size)
        return below if count - below < above - count else above

    @property
    def dtype(self) -> torch.dtype:
        """What scores and sums of this group are kept in: float32, or float64 if the weights are."""
        return reduce(torch.promote_types, (part.weight.dtype for part in self.slices), torch.float32)

    @property
    def weights(self) -> list[Tensor]:
        """One tensor a slice, in ``dtype``: half precision is too coarse to score in."""
        return [part.weight.detach().to(self.dtype) for part in self.slices]

    @property
    def matrices(self) -> UnitGroup:
        """The same units, without slices that hold one number a unit: biases, scales and shifts of norms.

        A group that has nothing else stays as it is.
        """
        large = [part for part in self.slices if not part.scalar]
        return self if len(large) in (0, len(self.slices)) else replace(self, slices=tuple(large))

    @property
    def scales(self) -> UnitGroup | None:
        """The same units, in scales of batch norms alone; ``None`` if there are none."""
        found = tuple(part for part in along(self.slices) if part.scale)
        return replace(self, slices=found) if found else None

    @property
    def readers(self) -> list[Slice]:
        """The weights that take its units in; of units within one tensor, the tensor, along its inputs."""
        if self.input_dim is not None:
            return [Slice(part.name, part.weight, self.input_dim) for part in self.slices]
        return [part for part in along(self.followers) if part.reads]

    @property
    def inputs(self) -> int:
        """How many features its readers tell apart: a unit is one, or within one tensor an input."""
        return self.size if self.input_dim is None else self.slices[0].weight.shape[self.input_dim]

    def sum(self, local: Callable[..., Tensor], *tensors: Sequence[Tensor]) -> Tensor:
        """The sum of an elementwise value over each unit.

        Args:
            local: Maps tensors of one slice, such as its weight, to a value an element.
            tensors: What it is given: one sequence an argument, with a tensor a slice.

        Returns:
            One number a unit, of ``shape``.
        """
        per_slice = zip(self.slices, *tensors, strict=True)
        sums = [part.sum(local(*arguments)) for part, *arguments in per_slice]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def view(self, look: Callable[[Tensor], Tensor]) -> UnitGroup:
        """Some of its units as a group of their own, where each element is one.

        Args:
            look: Gives a view of a tensor of the units' shape.
        """
        parts = (replace(part, weight=look(part.weight)) for part in self.slices)
        return replace(self, slices=tuple(parts))

    def rows(self, start: int, stop: int) -> UnitGroup:
        """The units ``start`` to ``stop`` of the first dimension; the group itself if it is not divisible."""
        return self.view(lambda tensor: tensor[start:stop]) if self.divisible else self

    @property
    def divisible(self) -> bool:
        """Whether some of its units make a group: single weights do."""
        return self.slices[0].divisible

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Row ranges whose elements fit a processor's cache, or one range if the group is not divisible."""
        if not self.divisible:
            return iter([(0, self.shape[0])])
        weight = self.slices[0].weight
        return row_ranges(len(weight), weight.numel(), weight.device)


@dataclass(frozen=True)
class Units:
    """What a structure found in a model.

    Args:
        groups: What may be pruned, in the order of the model.
        frozen: Name of a parameter or group to the reason why it stays as it is.
        budgets: What the whole network costs while units go, in "params" and in "macs", where that is known.
    """

    groups: tuple[UnitGroup, ...]
    frozen: dict[str, str]
    budgets: Mapping[str, Budget] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> Units:
        """The same, with some of the groups frozen.

        Args:
            reasons: Name of a group to the reason.
        """
        left = tuple(group for group in self.groups if group.name not in reasons)
        names = {group.name for group in left}
        budgets = {name: budget.within(names) for name, budget in self.budgets.items()}
        return Units(left, {**self.frozen, **reasons}, budgets)


def row_ranges(rows: int, elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cuts ``rows``, which hold ``elements`` in all, into ranges that fit a processor's cache."""
    # On an accelerator a launch costs more than the memory.
    budget = 2**20 if device.type == "cpu" else 2**26
    step = max(1, rows * budget // max(1, elements))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
