"""Turns the coupled and frozen labels of a trace into unit groups, and reasons for what is not pruned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.trace_record import Part, Role, TraceRecord
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice

_AxisKey = tuple[str, int]  # name of a tensor, and one of its dimensions
_Unit = list[tuple[_AxisKey, int]]  # the axes along which a unit has elements, and the index along each


def find_groups(model: nn.Module, trace: TraceRecord) -> Units:
    """Return the unit groups of a model that was traced.

    Args:
        model: The model whose tensors the slices refer to: the traced one or one of the same architecture.
        trace: The record of its trace.

    Returns:
        Groups in the order of the model, and for each tensor with frozen outputs the reason. Units that lie
        along the same dimensions of the same tensors form a group. Units that are outputs of no contraction
        belong to no group, and units in different parts of a dimension that is
        split to different ones.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    # axes that run over the outputs of a parameter; outputs of buffers are not pruned
    made = {
        (name, dim)
        for name, dim in _axes_with_role(trace, Role.OUTPUT)
        if name in parameters and len(trace.axis_labels[name]) > 1
    }
    units, frozen = _units(trace, made)
    alike: dict[tuple[tuple[_AxisKey, ...], tuple[Part, ...]], list[_Unit]] = defaultdict(list)
    parts = trace.parts()
    for root, unit in units.items():
        axes = tuple(dict.fromkeys(axis for axis, _ in unit))
        if made.intersection(axes):
            alike[axes, parts.get(root, ())].append(unit)
    groups = []
    attended, summed = trace.coupled_to_role(Role.HEAD), trace.coupled_to_role(Role.SUMMED)
    read = {(name, dim) for name, dim in _axes_with_role(trace, Role.INPUT) - made if name in parameters}
    scales = {axis for axis in _axes_with_role(trace, Role.SCALE) if len(trace.axis_labels[axis[0]]) == 1}
    for (axes, split), members in alike.items():
        outputs = [axis for axis in axes if axis in made]
        first = outputs[0][0]
        (name, dim), index = members[0][0]
        label = trace.axis_labels[name][dim][index]
        least = trace.least(label)
        if len(members) <= least:
            fewer = (
                f"is part of an op that needs {least} units"
                if least > 1
                else "is all one unit, and no layer is emptied"
            )
            frozen.setdefault(first, fewer)
            continue
        slices = _slices({**parameters, **buffers}, axes, members, scales, read)
        others = [axis for axis in axes if axis not in made and axis[0] in parameters]
        # biases, scales and shifts of norms: one element per unit
        single = [axis for axis in others if slices[axis].scalar and not slices[axis].reads]
        groups.append(
            UnitGroup(
                name=first.rpartition(".")[0] or first,
                slices=tuple(slices[axis] for axis in (*outputs, *single)),
                followers=tuple(slices[axis] for axis in others if axis not in single),
                buffers=tuple(slices[axis] for axis in axes if axis[0] in buffers),
                minimum=least,
                heads=bool(attended[label]),
                summed=bool(summed[label]),
                split_in=tuple(dict.fromkeys(part.module for part in split)),
            )
        )
    return Units(unique_names(groups), frozen)


def _axes_with_role(trace: TraceRecord, role: Role) -> set[_AxisKey]:
    """Return the axes along which a label has this role."""
    flags = trace.has_role(role)
    return {
        (name, dim)
        for name, axes in trace.axis_labels.items()
        for dim, labels in enumerate(axes)
        if flags[labels].any()
    }


def _units(trace: TraceRecord, made: Set[_AxisKey]) -> tuple[dict[int, _Unit], dict[str, str]]:
    """Return the units that may be pruned, and why the others may not.

    Args:
        trace: The record of the trace.
        made: The axes that run over the outputs of a parameter.

    Returns:
        The units, each a set of coupled labels that are not frozen, by the least of these, and the name of each
        parameter with frozen outputs mapped to the reason.
    """
    reasons = trace.labels.reasons()
    members: dict[int, _Unit] = defaultdict(list)
    frozen: dict[str, str] = {}
    for name, axes in trace.axis_labels.items():
        for dim, labels in enumerate(axes):
            for index, root in enumerate(trace.labels.find(labels).tolist()):
                if root not in reasons:
                    members[root].append(((name, dim), index))
                elif (name, dim) in made:
                    frozen.setdefault(name, reasons[root])
    return members, frozen


def _slices(
    tensors: Mapping[str, Tensor],
    axes: Iterable[_AxisKey],
    units: Iterable[_Unit],
    scales: Set[_AxisKey],
    read: Set[_AxisKey],
) -> dict[_AxisKey, AxisSlice]:
    """Return the slice of a group's units along each axis.

    Args:
        tensors: Parameters and buffers by name.
        axes: The axes along which the units have elements.
        units: The units of the group, in order.
        scales: The axes of the scales of batch norms.
        read: The axes of parameters that a contraction sums over, and that are not outputs.
    """
    numbers = {(name, dim): [-1] * tensors[name].shape[dim] for name, dim in axes}
    for number, unit in enumerate(units):
        for axis, index in unit:
            numbers[axis][index] = number
    slices = {}
    for axis, row in numbers.items():
        name, dim = axis
        places = torch.tensor(row, device=tensors[name].device)
        slices[axis] = AxisSlice(name, tensors[name], dim, places, scale=axis in scales, reads=axis in read)
    return slices


def unique_names(groups: Iterable[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Return the groups with a number appended to names that occur again, as in ``name[2]``."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        named.append(group if number == 1 else replace(group, name=f"{group.name}[{number}]"))
    return tuple(named)
