"""A unit group: the parameter slices whose units live or die together, and compete with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slice:
    """One parameter's share in a group.

    Args:
        name: The parameter's name in ``named_parameters()``.
        weight: The parameter.
        dim: The dimension along which units lie: index ``i`` of it belongs to unit ``i``.
            ``None``: each element is a unit of its own.
    """

    name: str
    weight: Tensor
    dim: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the units: that of the weight, or one dimension of it."""
        return self.weight.shape if self.dim is None else self.weight.shape[self.dim :][:1]

    def sum(self, elements: Tensor) -> Tensor:
        """Adds up what belongs to each unit.

        Args:
            elements: One number an element, of the weight's shape.

        Returns:
            One number a unit.
        """
        if self.dim is None:
            return elements
        return elements.movedim(self.dim, 0).reshape(elements.shape[self.dim], -1).sum(1)

    def spread(self, units: Tensor) -> Tensor:
        """Gives each element what its unit has: the weight's shape, without a copy."""
        if self.dim is None:
            return units
        last = self.weight.ndim - 1 - self.dim
        return units.view(-1, *(1 for _ in range(last))).expand(self.weight.shape)

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """What belongs to units ``start`` to ``stop``, of a tensor of the weight's shape."""
        return tensor.narrow(self.dim or 0, start, stop - start)


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that compete with each other: a layer's weights, or the channels that layers share.

    Args:
        name: Of the group, for people; unique in a model.
        slices: Which elements of which parameters make up each unit; all of one unit shape.
        input_dim: The dimension of ``shape`` that runs over a layer's inputs, if there is one.
    """

    name: str
    slices: tuple[Slice, ...]
    input_dim: int | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the units, and so of scores and of what is kept."""
        return self.slices[0].shape

    @property
    def size(self) -> int:
        """Number of units."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """What scores and sums of this group are kept in: float32, or float64 if the weights are."""
        return reduce(torch.promote_types, (part.weight.dtype for part in self.slices), torch.float32)

    @property
    def weights(self) -> list[Tensor]:
        """One tensor a slice, in ``dtype``: half precision is too coarse to score in."""
        return [part.weight.detach().to(self.dtype) for part in self.slices]

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

    def rows(self, start: int, stop: int) -> UnitGroup:
        """The units ``start`` to ``stop`` of the first dimension, as a group of their own."""
        parts = (replace(part, weight=part.rows(part.weight, start, stop)) for part in self.slices)
        return replace(self, slices=tuple(parts))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Row ranges whose elements fit a processor's cache, so that passes over them are cheap."""
        elements = sum(part.weight.numel() for part in self.slices)
        return row_ranges(self.shape[0], elements, self.slices[0].weight.device)


@dataclass(frozen=True)
class Units:
    """What a structure found in a model.

    Args:
        groups: What may be pruned, in the order of the model.
        frozen: Name of a parameter or group to the reason why it stays as it is.
    """

    groups: tuple[UnitGroup, ...]
    frozen: dict[str, str]


def row_ranges(rows: int, elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cuts ``rows``, which hold ``elements`` in all, into ranges that fit a processor's cache."""
    # On an accelerator a launch costs more than the memory.
    budget = 2**19 if device.type == "cpu" else 2**26
    step = max(1, rows * budget // max(1, elements))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
