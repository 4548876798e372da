"""One op that ran, as rules see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.channels.graph.label_fields import Fields, varying_dims
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.trace_record import TraceRecord


@dataclass(frozen=True)
class Call:
    """One op that ran.

    Args:
        record: Of the whole trace.
        func: The op.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors that it gave.
    """

    record: TraceRecord
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    @property
    def labels(self) -> Labels:
        """Of the whole trace."""
        return self.record.labels

    def fields(self, tensor: Tensor) -> Fields:
        """The fields of a tensor."""
        return self.record.fields(tensor)

    def of_weights(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight, or made of weights alone."""
        return tensor in self.record.weights

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether a tensor has one value everywhere, so that parts of any size meet it alike."""
        return tensor in self.record.uniform

    @property
    def name(self) -> str:
        """Of the op, without its overload."""
        return str(self.func._schema.name.split("::")[-1])

    def argument(self, name: str) -> Any:
        """An argument by its name in the op's schema, or ``None`` if the op has none of this name."""
        return argument_of(self.func, self.args, self.kwargs, name)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if torch.is_tensor(leaf)]

    def freeze(self, fields: Fields, why: str) -> None:
        """Keeps what these fields label."""
        for field in fields:
            self.labels.freeze(field, why)

    def without(self, fields: Fields, dims: frozenset[int], why: str) -> Fields:
        """The fields that vary in none of these dimensions; the others are frozen."""
        self.freeze(tuple(field for field in fields if varying_dims(field) & dims), why)
        return tuple(field for field in fields if not varying_dims(field) & dims)

    def disjoint(self, fields: Fields) -> Fields:
        """Of fields that vary along one dimension together, as heads and what lies within them, one is free."""
        crossing = [
            number
            for number, field in enumerate(fields)
            if any(varying_dims(field) & varying_dims(other) for other in fields if other is not field)
        ]
        if not crossing:
            return fields
        free = crossing[self.record.split([fields[number].numel() for number in crossing])]
        stuck = [number for number in crossing if number != free]
        self.freeze(tuple(fields[number] for number in stuck), "shares a dimension with other units")
        return tuple(field for number, field in enumerate(fields) if number not in stuck)


def argument_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What an op is called with under a name of its schema, or ``None`` if that has no such name."""
    for place, each in enumerate(func._schema.arguments):
        if each.name == name:
            if place < len(args):
                return args[place]
            return kwargs.get(name, each.default_value if each.has_default_value() else None)
    return None


Rule: TypeAlias = Callable[[Call], Sequence[Fields]]  # the fields of each output
