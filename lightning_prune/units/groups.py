"""A unit group: slices of parameters that make up units, which are scored and compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_prune.units.budgets import CostFunction
from lightning_prune.units.shards import to_local
from lightning_prune.units.slices import AxisSlice, Slice, axis_slices

UNKNOWN_INPUTS = "none of its dimensions is known to run over inputs, as in Linear, Conv and the like"


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units that compete with each other: the weights of a layer, or the channels that several layers share.

    Args:
        name: Name of the group in messages and reports; unique in a model.
        slices: The elements of parameters that make up each unit. They determine its score, and are masked with
            it. All slices have the same unit shape.
        followers: Slices that are masked along with a unit, but do not count in its score.
        buffers: Slices of buffers that are removed along with a unit when it is cut out.
        input_dim: The dimension of ``shape`` that runs over the inputs of a layer; ``None`` if there is none.
        minimum: The least number of units that are kept.
        multiple: The number of kept units is a multiple of this, unless all are kept.
        attributes: Pairs of a module name and an attribute name, of integers that shrink with the number of
            units.
        heads: Whether the units are attention heads.
        summed: Whether a sum takes in what the units are, so that a unit matters even if all weights that read
            it are 0.
        sized_in: Names of the modules that split the units from others along a dimension, or that apply filters
            to them that are no parameters.
        named: Whether the user has asked for the units by name; if so, they need not train.
        modules: Names of the modules that are the units, one a unit, if each unit is all of a module.
        numbered: Names of the modules that are called with the numbers of units, as a stack of experts is, each
            with whether it takes no number above the last (see ``Renumber``).
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
    summed: bool = False
    sized_in: tuple[str, ...] = ()
    named: bool = False
    modules: tuple[str, ...] = ()
    numbered: tuple[tuple[str, bool], ...] = ()

    @property
    def masked(self) -> tuple[Slice, ...]:
        """All slices that are 0 where a unit is removed."""
        return self.slices + self.followers

    @property
    def partly_filled(self) -> set[int]:
        """The sizes of the dimensions along which units lie with something else."""
        parts = axis_slices(self.masked)
        return {len(part.index) for part in parts if part.index is not None and bool((part.index < 0).any())}

    def number_after(self, before: int, units: Tensor) -> int:
        """Return what a number that shrinks with the units becomes.

        Args:
            before: The number. If it is the size of a dimension along which the units lie with something else,
                it becomes what is left of that; otherwise it shrinks as the number of units does.
            units: One bool a unit, False for one to cut.
        """
        left = {
            int(part.places(units).count_nonzero())
            for part in axis_slices(self.masked)
            if part.index is not None and len(part.index) == before and bool((part.index < 0).any())
        }
        return left.pop() if len(left) == 1 else before * int(units.count_nonzero()) // self.size

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor of units, and so of their scores and masks."""
        return self.slices[0].shape

    @property
    def size(self) -> int:
        """Number of units, removed ones included."""
        return self.shape.numel()

    @property
    def least(self) -> int:
        """The smallest number of units that may be kept: ``minimum``, rounded up to ``multiple``."""
        return min(self.size, -(-max(1, self.minimum) // self.multiple) * self.multiple)

    def allows(self, width: int) -> bool:
        """Return whether so many units may be kept."""
        return self.width(width) == width

    def width(self, count: int) -> int:
        """Return the allowed number of kept units that is nearest to ``count``; of two, the larger."""
        if self.multiple == 1:
            return max(count, self.least)
        below = max(count // self.multiple * self.multiple, self.least)
        above = min(below + self.multiple, self.size)
        return below if count - below < above - count else above

    def kept(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which units are kept; for single weights the mask itself, not a copy.

        Args:
            masks: Parameter name to bool mask, True where an element is kept.
        """
        # a unit is masked in all its slices, so that one that spans all units tells
        parts = self.slices[:1] if self.slices[0].spans else self.slices
        found = [part.kept(masks[part.name]) for part in parts]
        return found[0] if len(found) == 1 else torch.stack(found).any(0)

    @property
    def dtype(self) -> torch.dtype:
        """Type of scores and sums of this group: float32, or float64 if the weights are."""
        return reduce(torch.promote_types, (part.weight.dtype for part in self.slices), torch.float32)

    @property
    def weights(self) -> list[Tensor]:
        """The weight of each slice, in ``dtype``, since half precision is too coarse for scores."""
        return [part.weight.detach().to(self.dtype) for part in self.slices]

    @property
    def matrices(self) -> UnitGroup:
        """The same units, without slices that hold one number a unit: biases, and weights and biases of norms.

        A group with no other slices is returned unchanged.
        """
        large = [part for part in self.slices if not part.scalar]
        return self if len(large) in (0, len(self.slices)) else replace(self, slices=tuple(large))

    @property
    def scales(self) -> UnitGroup | None:
        """The same units, with only the scales of batch norms as slices; ``None`` if there are none."""
        found = tuple(part for part in axis_slices(self.slices) if part.scale)
        return replace(self, slices=found) if found else None

    @property
    def readers(self) -> list[AxisSlice]:
        """The weights of layers that take the units as inputs, each as a slice along its input dimension.

        Where the units lie within one weight (``input_dim`` is given), this is that weight itself.
        """
        if self.input_dim is not None:
            return [AxisSlice(part.name, part.weight, self.input_dim) for part in self.slices]
        return [part for part in axis_slices(self.followers) if part.reads]

    @property
    def inputs(self) -> int:
        """Number of input features of ``readers``: one a unit, or one an input if ``input_dim`` is given."""
        return self.size if self.input_dim is None else self.slices[0].weight.shape[self.input_dim]

    def sum(self, local: Callable[..., Tensor], *tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum of an elementwise value over each unit, over all slices.

        Args:
            local: Function of one tensor from each of ``tensors``, all for the same slice, such as its weight
                and its gradient. Returns one value an element, in the shape of the slice's weight.
            tensors: One sequence for each argument of ``local``, with one tensor a slice.

        Returns:
            One number a unit, of ``shape``.
        """
        per_slice = zip(self.slices, *tensors, strict=True)
        sums = [part.sum(local(*arguments)) for part, *arguments in per_slice]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def view(self, look: Callable[[Tensor], Tensor]) -> UnitGroup:
        """Return the group of the units that a view of each weight holds.

        Args:
            look: Returns a view of a tensor of the weight's shape: of some of its elements where elements are
                units, otherwise of all.
        """
        return replace(self, slices=tuple(replace(part, weight=look(part.weight)) for part in self.slices))

    def rows(self, start: int, stop: int) -> UnitGroup:
        """Return units ``start`` to ``stop`` of the first dimension; the group itself if not ``divisible``."""
        return self.view(lambda tensor: tensor[start:stop]) if self.divisible else self

    @property
    def here(self) -> UnitGroup:
        """The units whose rows this process holds: all units, unless rows are divided among processes."""
        return self.view(to_local)

    @property
    def divisible(self) -> bool:
        """Whether a subset of the rows is a group too, as it is for single weights."""
        return self.slices[0].divisible


@dataclass(frozen=True)
class Units:
    """The unit groups that a structure found in a model.

    Args:
        groups: Groups that may be pruned, in the order of the model.
        frozen: Name of a parameter or group that is not pruned, to the reason.
        budgets: The cost of the whole network, under "params", "macs" and "latency", where it is known.
        written: Names of the parameters that a pass of the network updates by itself, as a step does with a
            momentum encoder.
        parts: Names of the modules that were followed alone; empty if the whole network was.
        failed_heads: Name of a parameter whose attention heads cannot go whole, to the reason.
    """

    groups: tuple[UnitGroup, ...]
    frozen: dict[str, str]
    budgets: Mapping[str, CostFunction] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    failed_heads: Mapping[str, str] = field(default_factory=dict)

    def without_refused(self, refuses: Callable[[UnitGroup], str | None], who: str) -> Units:
        """Return the same units, with the groups frozen that a part cannot handle.

        Args:
            refuses: Returns the reason why the part cannot handle a group; ``None`` if it can.
            who: Name of the part, for the error message.

        Raises:
            ValueError: If no group is left.
        """
        refused = {group.name: refuses(group) for group in self.groups}
        units = self.without({name: why for name, why in refused.items() if why is not None})
        if not units.groups:
            raise ValueError(f"{who} can prune no layer. {listed_by_reason(units.frozen)}")
        return units

    def reasons(self, model: nn.Module) -> dict[str, str]:
        """Return ``frozen``, with each other matrix of the model that no group covers."""
        covered = {part.name for group in self.groups for part in group.masked}
        whole = (name for name, each in model.named_parameters() if each.ndim > 1 and name not in covered)
        return {**dict.fromkeys(whole, "the structure finds no units in it that may go"), **self.frozen}

    def among(self, names: Collection[str]) -> Units:
        """Return the groups of these names, with the cost of the tensors or ops that they shorten."""
        groups = tuple(group for group in self.groups if group.name in names)
        budgets = {name: budget.own(names) for name, budget in self.budgets.items()}
        return replace(self, groups=groups, budgets=budgets)

    def without(self, reasons: Mapping[str, str]) -> Units:
        """Return the same units, with some of the groups frozen, and the matrices that no other group covers.

        Args:
            reasons: Name of each group to freeze, to the reason.
        """
        left = tuple(group for group in self.groups if group.name not in reasons)
        names = {group.name for group in left}
        covered = {part.name for group in left for part in group.masked}
        whole = {
            part.name: reasons[group.name]
            for group in self.groups
            if group.name in reasons
            for part in group.masked
            if part.weight.ndim > 1 and part.name not in covered
        }
        budgets = {name: budget.within(names) for name, budget in self.budgets.items()}
        frozen = {**whole, **self.frozen, **reasons}
        return replace(self, groups=left, frozen=frozen, budgets=budgets)


def listed_by_reason(frozen: Mapping[str, str]) -> str:
    """Return why things are not pruned, in words: each reason once, after the names that it is true of.

    >>> listed_by_reason({"a.weight": "it is small", "b": "it is large", "a": "it is small"})
    'a.weight, a: it is small; b: it is large'
    """
    names: dict[str, list[str]] = {}
    for name, why in frozen.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(same)}: {why}" for why, same in names.items())


def row_ranges(rows: int, elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, each small enough for a processor's cache; at least one range.

    Args:
        rows: Number of rows.
        elements: Number of elements in all rows together.
        device: The device that holds them.
    """
    # On an accelerator, launching a kernel costs more than reading memory, so ranges are larger.
    budget = 2**20 if device.type == "cpu" else 2**26
    step = max(1, rows * budget // max(1, elements))
    for start in range(0, max(1, rows), step):
        yield start, min(start + step, rows)
