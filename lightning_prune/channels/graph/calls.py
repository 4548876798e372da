"""The interface between a traced op and the rule for its labels: arguments, outputs and label fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.channels.graph.label_fields import Fields, partition, varying_dims
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.trace_record import TraceRecord


@dataclass(frozen=True)
class Call:
    """One ATen op that ran in a trace.

    Args:
        record: The record of the trace.
        func: The op: an ``OpOverload``, or one that runs functions, such as ``torch.cond``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors that it returned.
        shape_before: The shape of its first argument before, if it changes this in place, as ``squeeze_`` does.
    """

    record: TraceRecord
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    shape_before: torch.Size | None = None

    @property
    def labels(self) -> Labels:
        """All labels of the trace."""
        return self.record.labels

    def fields(self, tensor: Tensor) -> Fields:
        """Return the label fields of a tensor."""
        return self.record.fields(tensor)

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape that an argument has had, which is that of its label fields."""
        if self.shape_before is None or tensor is not self.args[0]:
            return tensor.shape
        return self.shape_before

    def of_weights(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a weight (parameter or buffer), or computed from weights alone."""
        return tensor in self.record.weights

    def is_plain_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor is computed from weights alone, without a product of any."""
        return tensor in self.record.weights and tensor not in self.record.multiplied

    def is_uniform(self, tensor: Tensor) -> bool:
        """Return whether a tensor has one value everywhere, so that it can be cut to any size."""
        return tensor in self.record.uniform

    @property
    def name(self) -> str:
        """Name of the op, without namespace and overload."""
        return str(self.func.name().split("::")[-1].partition(".")[0])

    @property
    def key(self) -> str:
        """Name of the op in the table of rules: with its namespace, unless that is PyTorch's own."""
        name = str(self.func.name()).partition(".")[0].rstrip("_")
        return name.removeprefix("aten::")

    @property
    def title(self) -> str:
        """Name of the op for messages, by which torch's documentation knows it."""
        return self.name.strip("_").removeprefix("native_")

    @property
    def by_position(self) -> str:
        """The reason to freeze labels along a dimension in which the op addresses elements by index."""
        return f"feeds {self.title}, which addresses channels by position"

    @property
    def deciding(self) -> str:
        """The reason to freeze labels of an index or of positions, such as those of a grid of samples."""
        return f"decides what {self.title} takes"

    def argument(self, name: str) -> Any:
        """Return an argument of the op, or its default, by name; ``None`` if the schema has no such name."""
        return argument_of(self.func, self.args, self.kwargs, name)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return tensors_of((*self.args, *self.kwargs.values()))

    def freeze(self, fields: Fields, why: str) -> None:
        """Freeze all labels of these fields."""
        for field in fields:
            self.labels.freeze(field, why)

    def freeze_along(self, fields: Fields, dims: frozenset[int], why: str) -> Fields:
        """Freeze the fields that vary along one of these dimensions, and return the others."""
        varying, constant = partition(fields, dims)
        self.freeze(varying, why)
        return constant

    def freeze_overlapping(self, fields: Fields) -> Fields:
        """Freeze all but one of the fields that share a dimension, as heads and the channels within heads do.

        Returns:
            The fields that vary along no common dimension, and the one that the record's ``split`` chooses of
            the others.
        """
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


def schema_of(func: Any) -> Any:
    """Return the schema of an op; an empty one for those that run functions, such as ``torch.cond``."""
    return getattr(func, "_schema", _NO_SCHEMA)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among an op's arguments or results, which may be in lists, in order.

    Ops have no other containers.
    """
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
    return found


def argument_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return an argument of an op, or its default, by name; ``None`` if the op's schema has no such name."""
    for position, argument in enumerate(schema_of(func).arguments):
        if argument.name == name:
            if position < len(args):
                return args[position]
            return kwargs.get(name, argument.default_value if argument.has_default_value() else None)
    return None


def changes_shape_in_place(func: Any) -> bool:
    """Return whether an op changes the shape of its first argument in place, as ``squeeze_`` does."""
    return torch.Tag.inplace_view in getattr(func, "tags", ())


def values_decide_shape(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether values decide the shape of what an op returns, as in ``nonzero`` and in NMS.

    Args:
        func: The op.
        args: Its positional arguments.
    """
    if func is torch.ops.aten.index.Tensor:
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    # ops of detection libraries for non-maximum suppression have no tags
    return torch.Tag.dynamic_output_shape in getattr(func, "tags", ()) or "nms" in func.name()


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an op that it writes to."""
    written = [
        argument.name
        for argument in schema_of(func).arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tensors_of([argument_of(func, args, kwargs, name) for name in written])


_NO_SCHEMA = torch._C.parse_schema("none() -> ()")
Rule: TypeAlias = Callable[[Call], Sequence[Fields]]  # returns the label fields of each output
