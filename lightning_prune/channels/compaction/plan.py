"""The plan of a compaction, as data: which indices of which tensors are kept, and which attributes change."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.module_widths import widths
from lightning_prune.channels.compaction.whole_numbers import get_number
from lightning_prune.core import schema
from lightning_prune.core.averages import Average
from lightning_prune.core.tensors import tensors_by_name
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

# groups, each with a bool mask over its units, False for a unit to cut
Kept: TypeAlias = Sequence[tuple[UnitGroup, Tensor]]


@dataclass(frozen=True)
class Cut:
    """A cut along one dimension of one tensor.

    Args:
        name: Name of the parameter or buffer.
        dim: The dimension.
        size: Its size before the cut.
        kept: The indices that are kept, in ascending order.
    """

    name: str
    dim: int
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All changes that a compaction makes to a module.

    Args:
        cuts: The cuts, in any order; a tensor may be cut along several dimensions.
        attributes: Module name to the attributes that change, items of lists in them such as ``sizes[1]``, and
            numbers in objects in them such as ``config.heads``, each with its value before and after.
        removed: Names of the experts that lose all weights, and give zeros.
        numbered: Names of the stacks of experts that are called with the numbers from before the cut, each with
            whether it takes no number above the last.
    """

    cuts: tuple[Cut, ...] = ()
    attributes: Mapping[str, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    numbered: tuple[tuple[str, bool], ...] = ()

    @property
    def removed_parts(self) -> tuple[str, ...]:
        """What the names of the parameters begin with that are removed with an expert."""
        return tuple(f"{name}." for name in self.removed)

    def cut_of_stack(self, name: str) -> Cut | None:
        """Return the cut of a stack of experts; ``None`` if its parameters are not cut alike."""
        cuts = [each for each in self.cuts if each.name.rpartition(".")[0] == name and each.dim == 0]
        return cuts[0] if len({(each.size, each.kept) for each in cuts}) == 1 else None

    def cuts_of(self, name: str) -> list[Cut]:
        """Return the cuts of one tensor."""
        return self._by_name.get(name, [])

    @cached_property
    def _by_name(self) -> Mapping[str, list[Cut]]:
        found: dict[str, list[Cut]] = {}
        for cut in self.cuts:
            found.setdefault(cut.name, []).append(cut)
        return found

    def renamed(self, names: Mapping[str, str]) -> Plan:
        """Return the changes to the modules and tensors in ``names``, under the names that they map to."""
        cuts = (replace(cut, name=names[cut.name]) for cut in self.cuts if cut.name in names)
        attributes = {names[name]: each for name, each in self.attributes.items() if name in names}
        removed = (names[name] for name in self.removed if name in names)
        numbered = ((names[name], shares) for name, shares in self.numbered if name in names)
        return Plan(tuple(cuts), attributes, tuple(removed), tuple(numbered))

    def to_state(self) -> dict[str, Any]:
        """Return the plan as lists, mappings and plain values, for JSON and checkpoints."""
        return {
            "cuts": [[cut.name, cut.dim, cut.size, list(cut.kept)] for cut in self.cuts],
            "attributes": {
                name: {key: list(change) for key, change in changes.items()}
                for name, changes in self.attributes.items()
            },
            "removed": list(self.removed),
            "numbered": [list(each) for each in self.numbered],
        }


_CUT = schema.satisfying(
    lambda value: Cut(
        *schema.fixed_list(
            schema.string, schema.integer(), schema.integer(1), schema.sequence(schema.integer())
        )(value)
    ),
    lambda cut: all(one < other for one, other in pairwise((-1, *cut.kept, cut.size))),
    "places below its size, in ascending order",
    "[3]",
)
_ENTRIES = schema.record(
    {
        "cuts": schema.sequence(_CUT),
        "attributes": schema.mapping(schema.mapping(schema.fixed_list(schema.integer(), schema.integer()))),
        "removed": schema.sequence(schema.string),
        "numbered": schema.sequence(schema.fixed_list(schema.string, schema.boolean)),
    },
    before={"removed": [], "numbered": []},
)
PLAN = schema.satisfying(  # as Plan.to_state writes it
    lambda value: Plan(**_ENTRIES(value)),
    lambda plan: (
        len({(cut.name, cut.dim) for cut in plan.cuts}) == len(plan.cuts)
        and all(cut.kept or cut.name.startswith(plan.removed_parts) for cut in plan.cuts)
    ),
    "each dimension of a tensor once, and some of its places unless an expert is removed",
    ".cuts",
)


def shapes_after(model: nn.Module, plans: Iterable[Plan]) -> dict[int, torch.Size]:
    """Return the shapes of all parameters and buffers after some plans, by the ``id`` of the tensor.

    Args:
        model: The model before the plans are applied.
        plans: The plans, in the order in which they apply.

    Raises:
        ValueError: If a tensor that a plan cuts is missing or has another size.
    """
    tensors = tensors_by_name(model)
    shapes = {id(tensor): list(tensor.shape) for tensor in tensors.values()}
    for plan in plans:
        for cut in plan.cuts:
            shape = shapes[id(tensors[cut.name])] if cut.name in tensors else None
            if shape is None or len(shape) <= cut.dim or shape[cut.dim] != cut.size:
                found = "is missing" if shape is None else f"has shape {tuple(shape)}"
                raise ValueError(
                    f"the plan cuts {cut.name!r}, of size {cut.size} along dimension {cut.dim}, but in this"
                    f" model it {found}: it was made for another architecture, is carried out already, or"
                    " follows an earlier compaction, whose checkpoint has to be loaded first."
                )
            shape[cut.dim] = len(cut.kept)
    return {tensor: torch.Size(shape) for tensor, shape in shapes.items()}


def check_attributes(model: nn.Module, plan: Plan) -> None:
    """Check that the attributes that a plan changes belong to this model and agree with the plan's cuts.

    Raises:
        ValueError: If the plan cannot cut the tensors of this model; if a module that it changes is missing or
            an attribute has another value than before the plan; or if an attribute would end up with a value
            that contradicts the shapes of the tensors.
    """
    modules = dict(model.named_modules())
    required = _widths(model, shapes_after(model, [plan]), plan.attributes)
    for name, changes in plan.attributes.items():
        if name not in modules:
            raise ValueError(f"the plan changes {name!r}, which this model does not have.")
        for key, (before, after) in changes.items():
            present = get_number(modules[name], key)
            # an attribute that no tensor shape determines must be a count of units, such as heads
            allowed = key in required.get(name, ()) or (
                type(present) is type(after) is int and 0 < after <= before
            )
            if present != before or not allowed:
                raise ValueError(
                    f"the plan changes {name}.{key} from {before} to {after}, but in this model it is"
                    f" {schema.summary(present)}: it was made for another architecture."
                )
    for name, sizes in required.items():
        for key, size in sizes.items():
            _, after = plan.attributes.get(name, {}).get(key, (None, get_number(modules[name], key)))
            if after != size:
                raise ValueError(f"the plan leaves {name}.{key} at {after}, but its tensors at {size}.")


def check_applied(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError if a model does not have the shapes and attributes from after a plan."""
    tensors, modules = tensors_by_name(model), dict(model.named_modules())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for cut in plan.cuts:
        if shapes.get(cut.name, ())[cut.dim : cut.dim + 1] != (len(cut.kept),):
            raise ValueError(
                f"the plan has left {len(cut.kept)} of {cut.name!r} along dimension {cut.dim}, and in this"
                f" model its shape is {shapes.get(cut.name)}: load the weights of the same checkpoint first."
            )
    for name, changes in plan.attributes.items():
        for key, (_, after) in changes.items():
            if name not in modules or get_number(modules[name], key) != after:
                raise ValueError(f"the plan has set {name}.{key} to {after}, and in this model it is not.")


def check_experts(model: nn.Module, plan: Plan) -> None:
    """Check that the experts that a plan removes belong to this model, and lose all weights.

    Raises:
        ValueError: If they do not, or the plan does not cut the parameters of a stack of experts alike.
    """
    modules = dict(model.named_modules())
    emptied = {cut.name for cut in plan.cuts if not cut.kept}
    for name in plan.removed:
        weights = (
            {f"{name}.{leaf}" for leaf, _ in modules[name].named_parameters()} if name in modules else set()
        )
        if not weights or not weights <= emptied:
            raise ValueError(f"the plan removes {name!r}, but not all weights of such a module of this model.")
    for name, _ in plan.numbered:
        if name not in modules or plan.cut_of_stack(name) is None:
            raise ValueError(f"the plan numbers the experts of {name!r} anew, but does not cut them alike.")


def make_plan(model: nn.Module, kept: Kept, averages: Mapping[str, Average]) -> Plan:
    """Return the plan that cuts units out of a model, and out of averages within it (``AveragedModel``).

    Args:
        model: The model before the cut.
        kept: Groups, each with a bool mask over its units, False for a unit to cut.
        averages: What ``averages_within`` returns for the model.
    """
    places: dict[tuple[str, int], Tensor] = {}
    for group, units in kept:
        if units.all():
            continue
        for part in axis_slices((*group.masked, *group.buffers)):
            kept_places = part.places(units)
            places[part.name, part.dim] = kept_places & places.get((part.name, part.dim), kept_places)
    cuts = tuple(
        Cut(name, dim, len(kept_places), tuple(kept_places.nonzero().flatten().tolist()))
        for (name, dim), kept_places in places.items()
    )
    counts: dict[str, dict[str, tuple[Any, Any]]] = {}
    for group, units in kept:
        for name, key in group.attributes:
            before = get_number(model.get_submodule(name), key)
            after = group.number_after(before, units)
            if after != before:
                counts.setdefault(name, {})[key] = (before, after)
    changed = [(group, units.tolist()) for group, units in kept if not units.all()]
    removed = (
        name
        for group, units in changed
        for name, keep in zip(group.modules, units, strict=bool(group.modules))
        if not keep
    )
    numbered = (each for group, _ in changed for each in group.numbered)
    plan = _with_averages(Plan(cuts, counts, tuple(removed), tuple(numbered)), averages)
    attributes = _attributes(model, shapes_after(model, [plan]))
    for name, changes in plan.attributes.items():
        attributes.setdefault(name, {}).update(changes)
    return replace(plan, attributes=attributes)


def _with_averages(plan: Plan, averages: Mapping[str, Average]) -> Plan:
    """Return a plan extended by the same changes to the averages (``AveragedModel``) within the model."""
    cuts = {(cut.name, cut.dim): cut for cut in plan.cuts}
    attributes = dict(plan.attributes)
    removed, numbered = plan.removed, plan.numbered
    for place, average in averages.items():
        names = {name: f"{place}.{own}".rstrip(".") for name, own in average.names.items()}
        same = plan.renamed(names)
        cuts |= {(cut.name, cut.dim): cut for cut in same.cuts}
        attributes |= same.attributes
        removed, numbered = removed + same.removed, numbered + same.numbered
    return Plan(tuple(cuts.values()), attributes, removed, numbered)


def _attributes(model: nn.Module, shapes: Mapping[int, torch.Size]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return the size attributes that change: module name to attribute name to values before and after."""
    found = {}
    for name, sizes in _widths(model, shapes).items():
        present = {key: getattr(model.get_submodule(name), key) for key in sizes}
        changes = {key: (present[key], size) for key, size in sizes.items() if size != present[key]}
        if changes:
            found[name] = changes
    return found


def _widths(
    model: nn.Module, shapes: Mapping[int, torch.Size], others: Container[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the size attributes that modules have with these shapes, by module name.

    Args:
        model: The model before the cut.
        shapes: ``id`` of each parameter and buffer to its shape after the cut.
        others: Names of modules that are told of even if none of their tensors changes its shape.
    """
    found = {}
    for name, module in model.named_modules():
        tensors = [
            (leaf, tensor)
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        if name in others or any(tensor.shape != shapes[id(tensor)] for _, tensor in tensors):
            found[name] = widths(module, {leaf: shapes[id(tensor)] for leaf, tensor in tensors})
    return found
