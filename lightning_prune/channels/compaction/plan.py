"""The plan of a shrink, as data: which places of which tensors stay, and which attributes change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.module_widths import widths
from lightning_prune.core import schema
from lightning_prune.core.averages import averages_within
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

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

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """What it does to some modules and tensors, under other names."""
        cuts = (replace(cut, name=names[cut.name]) for cut in self.cuts if cut.name in names)
        attributes = {names[name]: each for name, each in self.attributes.items() if name in names}
        return Plan(tuple(cuts), attributes)

    def to_state(self) -> dict[str, Any]:
        """Plain values, for JSON and for checkpoints."""
        return {
            "cuts": [[cut.name, cut.dim, cut.size, list(cut.kept)] for cut in self.cuts],
            "attributes": {
                name: {key: list(change) for key, change in changes.items()}
                for name, changes in self.attributes.items()
            },
        }


_CUT = schema.satisfying(
    lambda value: Cut(
        *schema.fixed_list(
            schema.string, schema.integer(), schema.integer(1), schema.sequence(schema.integer())
        )(value)
    ),
    lambda cut: all(one < other for one, other in pairwise((-1, *cut.kept, cut.size))) and len(cut.kept) > 0,
    "at least one of the places below its size, in ascending order",
    "[3]",
)
_ENTRIES = schema.record(
    {
        "cuts": schema.sequence(_CUT),
        "attributes": schema.mapping(schema.mapping(schema.fixed_list(schema.integer(), schema.integer()))),
    }
)
PLAN = schema.satisfying(  # as Plan.to_state writes it
    lambda value: Plan(**_ENTRIES(value)),
    lambda plan: len({(cut.name, cut.dim) for cut in plan.cuts}) == len(plan.cuts),
    "each dimension of a tensor once",
    ".cuts",
)


def shapes_after(model: nn.Module, plans: Iterable[Plan]) -> dict[int, torch.Size]:
    """Identity of each parameter and buffer to the shape that it has once plans are carried out.

    Args:
        model: As it is before.
        plans: In their order.

    Raises:
        ValueError: If a tensor is missing or of another size.
    """
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    shapes = {id(tensor): list(tensor.shape) for tensor in tensors.values()}
    for plan in plans:
        for cut in plan.cuts:
            shape = shapes[id(tensors[cut.name])] if cut.name in tensors else None
            if shape is None or len(shape) <= cut.dim or shape[cut.dim] != cut.size:
                found = "is missing" if shape is None else f"has shape {tuple(shape)}"
                raise ValueError(
                    f"the plan cuts {cut.name!r}, of size {cut.size} along dimension {cut.dim}, but in this"
                    f" model it {found}: it was made for another architecture, or is carried out already."
                )
            shape[cut.dim] = len(cut.kept)
    return {tensor: torch.Size(shape) for tensor, shape in shapes.items()}


def check_attributes(model: nn.Module, plan: Plan) -> None:
    """Makes sure that a plan changes attributes as it changes tensors, and nothing beside them.

    Raises:
        ValueError: If it does not, or a module is missing.
    """
    modules = dict(model.named_modules())
    due = _widths(model, shapes_after(model, [plan]))
    for name, changes in plan.attributes.items():
        if name not in modules:
            raise ValueError(f"the plan changes {name!r}, which this model does not have.")
        for key, (before, after) in changes.items():
            present = getattr(modules[name], key, None)
            # what is no size of a tensor is a count of units, such as heads
            own = key in due[name] or (type(present) is type(after) is int and 0 < after <= before)
            if present != before or not own:
                raise ValueError(
                    f"the plan changes {name}.{key} from {before} to {after}, but in this model it is"
                    f" {schema.summary(present)}: it was made for another architecture."
                )
    for name, sizes in due.items():
        for key, size in sizes.items():
            _, after = plan.attributes.get(name, {}).get(key, (None, getattr(modules[name], key)))
            if after != size:
                raise ValueError(f"the plan leaves {name}.{key} at {after}, but its tensors at {size}.")


def make_plan(model: nn.Module, kept: Kept) -> Plan:
    """The plan that takes units out, of averages within the model, too.

    Args:
        model: The module, as it is before.
        kept: What stays of each group.
    """
    places: dict[tuple[str, int], Tensor] = {}
    for group, units in kept:
        if units.all():
            continue
        for part in axis_slices((*group.masked, *group.buffers)):
            stays = part.places(units)
            before = places.get((part.name, part.dim))
            places[part.name, part.dim] = stays if before is None else before & stays
    cuts = tuple(
        Cut(name, dim, len(stays), tuple(stays.nonzero().flatten().tolist()))
        for (name, dim), stays in places.items()
    )
    counts: dict[str, dict[str, tuple[Any, Any]]] = {}
    for group, units in kept:
        for name, key in group.attributes:
            before = getattr(model.get_submodule(name), key)
            after = before * int(units.count_nonzero()) // group.size
            if after != before:
                counts.setdefault(name, {})[key] = (before, after)
    plan = _with_averages(model, Plan(cuts, counts))
    attributes = _attributes(model, shapes_after(model, [plan]))
    for name, changes in plan.attributes.items():
        attributes.setdefault(name, {}).update(changes)
    return Plan(plan.cuts, attributes)


def _with_averages(model: nn.Module, plan: Plan) -> Plan:
    """A plan, and the same for averages within the model."""
    cuts = {(cut.name, cut.dim): cut for cut in plan.cuts}
    attributes = dict(plan.attributes)
    for place, average in averages_within(model).items():
        theirs = {name: f"{place}.{own}".rstrip(".") for name, own in average.names.items()}
        copied = plan.renamed(theirs)
        cuts |= {(cut.name, cut.dim): cut for cut in copied.cuts}
        attributes |= copied.attributes
    return Plan(tuple(cuts.values()), attributes)


def _attributes(model: nn.Module, shapes: Mapping[int, torch.Size]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What modules say of their own sizes, where that changes."""
    found = {}
    for name, sizes in _widths(model, shapes).items():
        module = model.get_submodule(name)
        changes = {key: (getattr(module, key), size) for key, size in sizes.items()}
        changes = {key: change for key, change in changes.items() if change[0] != change[1]}
        if changes:
            found[name] = changes
    return found


def _widths(model: nn.Module, shapes: Mapping[int, torch.Size]) -> dict[str, dict[str, Any]]:
    """Module name to what it will say of its own sizes."""
    found = {}
    for name, module in model.named_modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        own = {leaf: shapes[id(tensor)] for leaf, tensor in tensors if tensor is not None}
        found[name] = widths(module, own)
    return found
