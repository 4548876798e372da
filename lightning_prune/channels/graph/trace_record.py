"""The results of a trace: the labels of all tensors, the roles of labels, and the multiply-adds of each op."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.sliced_parts import SlicedParts
from lightning_prune.channels.graph.splits import Split
from lightning_prune.core.tensors import named_tensors

_SCRIPTED = "compiled TorchScript code has fixed sizes"


class Role(Enum):
    """The part that a labelled element has in the model; a label may have several."""

    OUTPUT = "an output of a weight: a contraction has made it"
    INPUT = "an input of a weight: a contraction sums over it"
    COLUMN = "a column of an embedding: the rows that are looked up have made it"
    HEAD = "an attention head"
    SCALE = "an element of the scale of a batch norm"
    SUMMED = "a term of a sum that no weight multiplies, as of the mean of a layer norm"


class Part(NamedTuple):
    """A part of a dimension that is split: its number in the trace, and the module that has split it."""

    number: int
    module: str


class TraceRecord:
    """Labels of the tensors of one model, coupled and frozen by the ops of its passes.

    Args:
        model: The model. Each index along each dimension of each of its floating-point parameters and buffers
            gets a label, the same one in every trace of the model.
        split: What may shrink where a labelled dimension is split.

    Attributes:
        labels: All labels, coupled and frozen by the ops that ran.
        axis_labels: Name of each parameter and buffer to its labels, one tensor for each dimension.
        names: ``id`` of each parameter and buffer of the copy that runs to its name.
        weights: Tensors that are weights (parameters or buffers), or computed from weights alone, each with the
            names of these.
        multiplied: Those of them that a product of weights took part in, as what is made of learned queries.
        uniform: Tensors that were created in the pass with one value everywhere, as by ``zeros``.
        read: Names of the parameters and buffers that an op has read.
        met: For these names whether an op that reads other tensors, too, has given any element with them.
        used: Names of the parameters and buffers that the results depend on.
        op_costs: For each product that was counted its multiply-adds, and the labels along each dimension that
            these run over.
        op_factors: These labels, for each product of the op that is running.
        split_sizes: Where a dimension was split, the sizes of those that it became.
        joins_zeros: Whether zeros and the like were joined with as many channels.
        line_of: Returns the line of code that has made a tensor of the pass that runs, if known.
    """

    def __init__(self, model: nn.Module, split: Split) -> None:
        self.labels = Labels()
        self.axis_labels: dict[str, tuple[Tensor, ...]] = {}
        self.names: dict[int, str] = {}
        self.weights: Any = WeakTensorKeyDictionary()
        self.multiplied: Any = WeakTensorKeyDictionary()
        self.uniform: Any = WeakTensorKeyDictionary()
        self.read: set[str] = set()
        self.met: dict[str, bool] = {}
        self.used: set[str] = set()
        self.op_costs: list[tuple[int, list[Tensor]]] = []
        self.op_factors: list[list[Tensor]] = []
        self.split_sizes: list[Sequence[int]] = []
        self.joins_zeros = False
        self.line_of: Callable[[Tensor], str | None] = lambda tensor: None
        self._split = split
        self._fields: Any = WeakTensorKeyDictionary()
        self._parts: list[tuple[Tensor, str]] = []
        self._filtered: list[tuple[Tensor, str]] = []
        self._buffers = {name for name, _ in model.named_buffers()}
        self._sliced = SlicedParts()
        self._least: list[tuple[Tensor, int]] = []
        self._roles: dict[Role, list[Tensor]] = defaultdict(lambda: [torch.zeros(0, dtype=torch.int64)])
        tensors = _floating_point(model)
        sizes = [size for tensor in tensors.values() for size in tensor.shape]
        lines = iter(self.labels.new(sum(sizes)).split(sizes))
        for name, tensor in tensors.items():
            self.axis_labels[name] = tuple(next(lines) for _ in tensor.shape)
        self._first_free = len(self.labels)
        for prefix, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                why = f"is part of, or coupled with, {prefix or 'the model'}: {_SCRIPTED}"
                for leaf, _ in module.named_parameters(prefix):
                    for line in self.axis_labels.get(leaf, ()):
                        self.note(Role.OUTPUT, line)
                        self.labels.freeze(line, why)

    @property
    def ran(self) -> set[str]:
        """Names of the parameters and buffers that an op has read, other than for results without elements."""
        return {name for name in self.read if self.met.get(name, True)}

    def note_read(
        self, tensors: Sequence[Tensor], outputs: Sequence[Tensor], *, multiplied: bool = False
    ) -> set[str]:
        """Record that an op has read tensors.

        A layer that is given no rows, as for objects that are not there, tells nothing about its weights.

        Args:
            tensors: What the op has read.
            outputs: What it has returned.
            multiplied: Whether it is a product.

        Returns:
            The names of the parameters and buffers among the tensors.
        """
        read = {self.names[id(tensor)] for tensor in tensors if id(tensor) in self.names}
        self.read |= read
        sources = [self.weights.get(tensor) for tensor in tensors]
        names = frozenset[str]().union(*(each for each in sources if each is not None))
        if None not in sources:
            self.weights.update((output, names) for output in outputs)
            if multiplied or any(tensor in self.multiplied for tensor in tensors):
                self.multiplied.update((output, True) for output in outputs)
        elif outputs:
            for output in outputs:
                if id(output) not in self.names:
                    self.weights.pop(output, None)  # what was made of nothing holds data now
            elements = any(output.numel() for output in outputs)
            self.met.update((name, elements or self.met.get(name, False)) for name in names)
        return read

    def label(self, model: nn.Module) -> None:
        """Give the parameters and buffers of a copy of the model the labels of the model."""
        self.names = {id(tensor): name for name, tensor in named_tensors(model)}
        for name, tensor in _floating_point(model).items():
            self.weights[tensor] = frozenset([name])
            self._fields[tensor] = tuple(
                line.view([-1 if dim == each else 1 for each in range(tensor.ndim)])
                for dim, line in enumerate(self.axis_labels[name])
                if tensor.shape[dim] > 1
            )

    def fields(self, tensor: Tensor) -> Fields:
        """Return the label fields of a tensor."""
        found: Fields = self._fields.get(tensor, ())
        return found

    def set_fields(self, tensor: Tensor, fields: Fields) -> None:
        """Set the label fields of a tensor."""
        self._fields[tensor] = fields

    def new_free(self, count: int) -> Tensor:
        """Return new labels for the indices of a dimension that takes any size."""
        return self.labels.new(count)

    def is_free(self, field: Tensor) -> bool:
        """Return whether the labels of a field are free ones, coupled with no parameter or buffer."""
        return bool((self.labels.find(field) >= self._first_free).all())

    def split(self, sizes: Sequence[int]) -> int:
        """Return the number of the dimension whose indices are units.

        Args:
            sizes: The sizes of the dimensions that one labelled dimension becomes.
        """
        self.split_sizes.append(sizes)
        return self._split.choose(sizes)

    def zeros_follow(self) -> bool:
        """Return whether zeros that are joined with as many channels take their number from these."""
        self.joins_zeros = True
        return self._split.zeros_follow

    def choices(self, split: Split) -> tuple[int, ...]:
        """Return what a split chooses where this trace had a choice."""
        follow = [int(split.zeros_follow)] if self.joins_zeros else []
        return (*map(split.choose, self.split_sizes), *follow)

    def same_with(self, split: Split) -> bool:
        """Return whether a trace with another split would be the same, since all its choices are."""
        return self.choices(split) == self.choices(self._split)

    def note(self, role: Role, field: Tensor) -> None:
        """Record the role of the labels of a field."""
        self._roles[role].append(_flat_copy(field))

    def are_heads(self, fields: Fields) -> bool:
        """Return whether labels of these fields are those of attention heads."""
        flags = self.coupled_to_role(Role.HEAD)
        return any(bool(flags[field].any()) for field in fields)

    def frozen_heads(self) -> dict[str, str]:
        """Return the names of the tensors whose outputs are heads of attention that stay, with the reasons."""
        attended, made = self.coupled_to_role(Role.HEAD), self.has_role(Role.OUTPUT)
        reasons = self.labels.reasons()
        found: dict[str, str] = {}
        for name, axes in self.axis_labels.items():
            for line in axes:
                roots = self.labels.find(line[attended[line] & made[line]]).tolist()
                if roots and roots[0] in reasons:
                    found[name] = reasons[roots[0]]
        return found

    def note_part(self, field: Tensor) -> None:
        """Record that the labels of a field lie in one part of a dimension, others along it in other parts.

        A number that says where the part begins or ends may stand for one of them alone, so that their units
        are tried, and have to stay, apart.
        """
        self._parts.append((_flat_copy(field), self.labels.place))

    def is_of_parameters(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter, or computed from parameters and buffers alone."""
        return not self._buffers.issuperset(self.weights.get(tensor, ()))

    def note_filtered(self, labels: Tensor) -> None:
        """Record that the module that runs filters each of the channels that have these labels by itself."""
        self._filtered.append((_flat_copy(labels), self.labels.place))

    def filtered_in(self) -> dict[int, tuple[str, ...]]:
        """Return for the least of coupled labels the modules that filter channels one by one, if any."""
        found: dict[int, tuple[str, ...]] = defaultdict(tuple)
        for labels, place in self._filtered:
            for root in torch.unique(self.labels.find(labels)).tolist():
                found[root] += (place,)
        return found

    def note_slice(self, field: Tensor, dim: int, bounds: tuple[int, int]) -> None:
        """Record that a slice takes the part of a dimension between these bounds, if a result depends on it."""
        if not self.labels.lenient:
            self._sliced.note(field, dim, bounds, self.labels.place)

    def couple_slices(self) -> None:
        """Couple the parts of equal size that slices have taken in the pass that has ended."""
        self._parts += [(_flat_copy(part), place) for part, place in self._sliced.couple(self.labels)]
        self._sliced = SlicedParts()
        self.labels.place = ""

    def parts(self) -> dict[int, tuple[Part, ...]]:
        """Return for the least of coupled labels the parts in which these lie, if any."""
        found: dict[int, tuple[Part, ...]] = defaultdict(tuple)
        for number, (labels, place) in enumerate(self._parts):
            for root in torch.unique(self.labels.find(labels)).tolist():
                found[root] += (Part(number, place),)
        return found

    def note_macs(self, lines: Sequence[Tensor]) -> None:
        """Record the labels along each dimension that the next product of the running op runs over."""
        self.op_factors.append([_flat_copy(line) for line in lines])

    def note_least(self, labels: Tensor, count: int) -> None:
        """Record that an op needs at least ``count`` of the units that have these labels."""
        self._least.append((_flat_copy(labels), count))

    def least(self, root: int) -> int:
        """Return how many units the ops need of those whose least label is ``root``, at least 1."""
        return max((count for each, count in self._least if (self.labels.find(each) == root).any()), default=1)

    def has_role(self, role: Role) -> Tensor:
        """Return a bool for each label: whether it has this role."""
        return self._among(torch.cat(self._roles[role]))

    def coupled_to_role(self, role: Role) -> Tensor:
        """Return a bool for each label: whether it, or one that is coupled with it, has this role."""
        roots = self.labels.find(torch.arange(len(self.labels)))
        return self._among(self.labels.find(torch.cat(self._roles[role])))[roots]

    def _among(self, found: Tensor) -> Tensor:
        flags = torch.zeros(len(self.labels), dtype=torch.bool)
        flags[found] = True
        return flags


def _floating_point(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that may be cut: integers are indices, and complex numbers are not followed."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}


def _flat_copy(field: Tensor) -> Tensor:
    """Return the labels of a field in memory of their own: a view would keep a whole tensor alive."""
    return field.flatten().clone()
