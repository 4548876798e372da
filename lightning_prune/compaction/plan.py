"""The plan of a shrink, as data: which places of which tensors stay, and which attributes change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.compaction.widths import widths
from lightning_prune.shares import along
from lightning_prune.units import UnitGroup

Kept: TypeAlias = Sequence[tuple[UnitGroup, Tensor]]  # groups, each with a bool a unit, False where it goes


@dataclass(frozen=True)
class Cut:
    """One dimension of one tensor, made shorter.

    Args:
        name: Of the parameter or buffer.
        dim: The dimension.
        size: How long it was.
        kept: Which places stay, in ascending order.
    """

    name: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All that a shrink does to a module.

    Args:
        cuts: In any order; a tensor may be cut along several dimensions.
        attributes: Module name to the attributes that get another value: what it was, and what it becomes.
    """

    cuts: tuple[Cut, ...] = ()
    attributes: Mapping[str, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """Plain values, for JSON and for checkpoints."""
        return {
            "cuts": [[cut.name, cut.dim, cut.size, list(cut.kept)] for cut in self.cuts],
            "attributes": {
                name: {key: list(change) for key, change in changes.items()}
                for name, changes in self.attributes.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_state` wrote."""
        cuts = (Cut(name, dim, size, tuple(kept)) for name, dim, size, kept in state["cuts"])
        attributes = {
            name: {key: (before, after) for key, (before, after) in changes.items()}
            for name, changes in state["attributes"].items()
        }
        return cls(tuple(cuts), attributes)


def make_plan(model: nn.Module, kept: Kept) -> Plan:
    """The plan that takes units out.

    Args:
        model: The module, as it is before.
        kept: What stays of each group.
    """
    places: dict[tuple[str, int], Tensor] = {}
    for group, units in kept:
        if units.all():
            continue
        for part in along((*group.masked, *group.buffers)):
            stays = part.places(units)
            before = places.get((part.name, part.dim))
            places[part.name, part.dim] = stays if before is None else before & stays
    cuts = tuple(
        Cut(name, dim, len(stays), tuple(stays.nonzero().flatten().tolist()))
        for (name, dim), stays in places.items()
    )
    attributes = _attributes(model, cuts)
    for group, units in kept:
        for name, key in group.attributes:
            before = getattr(model.get_submodule(name), key)
            after = before * int(units.count_nonzero()) // group.size
            if after != before:
                attributes.setdefault(name, {})[key] = (before, after)
    return Plan(cuts, attributes)


def _attributes(model: nn.Module, cuts: tuple[Cut, ...]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What modules say of their own sizes, where that changes."""
    shapes: dict[int, torch.Size] = {}
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for cut in cuts:
        tensor = tensors[cut.name]
        sizes = list(shapes.get(id(tensor), tensor.shape))
        sizes[cut.dim] = len(cut.kept)
        shapes[id(tensor)] = torch.Size(sizes)
    found = {}
    for name, module in model.named_modules():
        own = {
            leaf: shapes.get(id(tensor), tensor.shape)
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        changes = {key: (getattr(module, key), value) for key, value in widths(module, own).items()}
        changes = {key: change for key, change in changes.items() if change[0] != change[1]}
        if changes:
            found[name] = changes
    return found
