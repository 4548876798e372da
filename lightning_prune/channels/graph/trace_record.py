"""What a trace has found: the labels of all tensors, the roles of labels, and the multiply-adds of each op."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.labels import Labels

Split: TypeAlias = Callable[[Sequence[int]], int]
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Role(Enum):
    """What a label stands for."""

    OUTPUT = "an output of a weight: a contraction has made it"
    INPUT = "an input of a weight: a contraction sums over it"
    HEAD = "an attention head"
    SCALE = "an element of the scale of a batch norm"


class TraceRecord:
    """Labels of the tensors of one model, and what the ops of its passes did to them.

    Args:
        model: Each dimension of each of its parameters and floating-point buffers gets labels, the same ones
            in every trace of the model.
        split: Given the sizes of the dimensions that a labelled dimension becomes, returns the number of the
            one whose places may be cut.

    Attributes:
        labels: All labels, coupled and frozen by the ops that ran.
        places: Tensor name to its labels, one tensor for each dimension.
        names: ``id`` of each parameter and buffer to its name.
        weights: The tensors that are weights, or made of weights alone, to the names of those weights.
        uniform: The tensors that were made in the pass with one value everywhere, as by ``zeros``.
        used: Names of the parameters and buffers that took part in the results.
        terms: Multiply-adds of each op that was counted, the labels along each dimension that they run over,
            and the names of the weights.
        factors: The last two of these, for the op that runs.
        split_used: Whether ``split`` was called.
    """

    def __init__(self, model: nn.Module, split: Split) -> None:
        self.labels = Labels()
        self.places: dict[str, tuple[Tensor, ...]] = {}
        self.names: dict[int, str] = {}
        self.weights: Any = WeakTensorKeyDictionary()
        self.uniform: Any = WeakTensorKeyDictionary()
        self.used: set[str] = set()
        self.terms: list[tuple[int, list[Tensor], frozenset[str]]] = []
        self.factors: tuple[list[Tensor], frozenset[str]] = [], frozenset()
        self.split_used = False
        self._split = split
        self._fields: Any = WeakTensorKeyDictionary()
        self._roles: dict[Role, list[Tensor]] = defaultdict(lambda: [torch.zeros(0, dtype=torch.int64)])
        tensors = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_floating_point()  # integers are indices, and go by position
        }
        sizes = [size for tensor in tensors.values() for size in tensor.shape]
        lines = iter(self.labels.new(sum(sizes)).split(sizes))
        for name, tensor in tensors.items():
            self.places[name] = tuple(next(lines) for _ in tensor.shape)
            self.names[id(tensor)] = name
            self.weights[tensor] = frozenset([name])
            self._fields[tensor] = tuple(
                line.view([-1 if dim == each else 1 for each in range(tensor.ndim)])
                for dim, line in enumerate(self.places[name])
                if tensor.shape[dim] > 1
            )
        for prefix, module in model.named_modules():
            if isinstance(module, _RECURRENT):
                why = f"is part of {prefix or 'the model'}, and {type(module).__name__} layers are not cut"
                for leaf, _ in module.named_parameters(prefix):
                    for line in self.places.get(leaf, ()):
                        self.note(Role.OUTPUT, line)
                        self.labels.freeze(line, why)

    def fields(self, tensor: Tensor) -> Fields:
        """Return the label fields of a tensor."""
        found: Fields = self._fields.get(tensor, ())
        return found

    def set_fields(self, tensor: Tensor, fields: Fields) -> None:
        """Set the label fields of a tensor."""
        self._fields[tensor] = fields

    def split(self, sizes: Sequence[int]) -> int:
        """Return which of the dimensions that a labelled one becomes may be cut, given their sizes."""
        self.split_used = True
        return self._split(sizes)

    def note(self, role: Role, field: Tensor) -> None:
        """Note what the labels of a field stand for."""
        self._roles[role].append(_flat_copy(field))

    def note_macs(self, lines: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Note the labels along each dimension that the op's multiply-adds run over, and its operands."""
        names = (self.weights.get(tensor, frozenset[str]()) for tensor in tensors)
        self.factors = [_flat_copy(line) for line in lines], frozenset().union(*names)

    def has_role(self, role: Role) -> Tensor:
        """Return for each label whether it stands for this."""
        return self._among(torch.cat(self._roles[role]))

    def coupled_to_role(self, role: Role) -> Tensor:
        """Return for each label whether it, or one that is coupled with it, stands for this."""
        roots = self.labels.find(torch.arange(len(self.labels)))
        return self._among(self.labels.find(torch.cat(self._roles[role])))[roots]

    def _among(self, found: Tensor) -> Tensor:
        flags = torch.zeros(len(self.labels), dtype=torch.bool)
        flags[found] = True
        return flags


def _flat_copy(field: Tensor) -> Tensor:
    """Return its labels in memory of their own: a view would keep the whole tensor alive."""
    return field.flatten().clone()
