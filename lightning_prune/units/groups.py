"""A unit group: the parameter slices whose units live or die together, and compete with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from lightning_prune.units.budgets import Budget
from lightning_prune.units.shards import to_local
from lightning_prune.units.slices import AxisSlice, Slice, axis_slices


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
    slices: tuple[Slice, ...]
    followers: tuple[Slice, ...] = ()
    buffers: tuple[Slice, ...] = ()
    input_dim: int | None = None
    minimum: int = 1
    multiple: int = 1
    attributes: tuple[tuple[str, str], ...] = ()
    heads: bool = False

    @property
    def masked(self) -> tuple[Slice, ...]:
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
        found = tuple(part for part in axis_slices(self.slices) if part.scale)
        return replace(self, slices=found) if found else None

    @property
    def readers(self) -> list[AxisSlice]:
        """The weights that take its units in; of units within one tensor, the tensor, along its inputs."""
        if self.input_dim is not None:
            return [AxisSlice(part.name, part.weight, self.input_dim) for part in self.slices]
        return [part for part in axis_slices(self.followers) if part.reads]

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
    def here(self) -> UnitGroup:
        """The units whose rows this process holds: all, unless they lie in several processes."""
        return self.view(to_local)

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

    def accepted(self, refuses: Callable[[UnitGroup], str | None], who: str) -> Units:
        """The same, without the groups that someone can do nothing with.

        Args:
            refuses: Gives the reason, or ``None``.
            who: Who it is, for the error.

        Raises:
            ValueError: If nothing is left.
        """
        found = {group.name: refuses(group) for group in self.groups}
        units = self.without({name: why for name, why in found.items() if why is not None})
        if not units.groups:
            names: dict[str, list[str]] = {}
            for name, why in units.frozen.items():
                names.setdefault(why, []).append(name)
            reasons = "; ".join(f"{', '.join(same)}: {why}" for why, same in names.items())
            raise ValueError(f"{who} can prune no layer. {reasons}")
        return units

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
    """Cuts ``rows``, which hold ``elements`` in all, into ranges that fit a processor's cache; at least one."""
    # On an accelerator a launch costs more than the memory.
    budget = 2**20 if device.type == "cpu" else 2**26
    step = max(1, rows * budget // max(1, elements))
    for start in range(0, max(1, rows), step):
        yield start, min(start + step, rows)
