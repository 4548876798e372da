"""One op that ran, as rules see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.fields import Fields, varying
from lightning_prune.graph.labels import Labels


@dataclass(frozen=True)
class Call:
    """One op that ran.

    Args:
        labels: Of the whole trace.
        func: The op.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors that it gave.
        fields: Looks up the fields of a tensor.
        make: Notes labels of what a contraction made.
        count: Notes multiply-adds, and labels along each dimension that they run over.
        weights: Whether all tensors that went in are weights, or made of weights alone.
    """

    labels: Labels
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    fields: Callable[[Tensor], Fields]
    make: Callable[[Tensor], None]
    count: Callable[[int, Sequence[Tensor]], None]
    weights: bool

    @property
    def name(self) -> str:
        """Of the op, without its overload."""
        return str(self.func._schema.name.split("::")[-1])

    def argument(self, name: str) -> Any:
        """An argument by its name in the op's schema, or ``None`` if the op has none of this name."""
        for place, each in enumerate(self.func._schema.arguments):
            if each.name == name:
                if place < len(self.args):
                    return self.args[place]
                return self.kwargs.get(name, each.default_value if each.has_default_value() else None)
        return None

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
        self.freeze(tuple(field for field in fields if varying(field) & dims), why)
        return tuple(field for field in fields if not varying(field) & dims)


Rule: TypeAlias = Callable[[Call], Sequence[Fields]]  # the fields of each output
