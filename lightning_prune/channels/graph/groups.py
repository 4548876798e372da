"""Turns the coupled and frozen labels of a trace into unit groups, and reasons for what is not pruned."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.channels.graph.trace_record import Part, Role, TraceRecord
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice

_AxisKey = tuple[str, int]  # name of a tensor, and one of its dimensions


class _Places(NamedTuple):
    """Indices along axes whose labels are not frozen, in the order of the model; one array element for each.

    Attributes:
        root: The least of the labels that are coupled with that of the index.
        axis: The number of the axis.
        place: The index along it.
    """

    root: NDArray[Any]
    axis: NDArray[Any]
    place: NDArray[Any]


class _Alike(NamedTuple):
    """Units that lie along the same axes, in the same parts of these.

    Attributes:
        root: The least label of the first unit.
        parts: The parts.
        size: The number of units.
        units: For each place the number of its unit.
        places: The places of all units.
    """

    root: int
    parts: tuple[Part, ...]
    size: int
    units: NDArray[Any]
    places: _Places


def find_groups(model: nn.Module, trace: TraceRecord) -> Units:
    """Return the unit groups of a model that was traced.

    Args:
        model: The model whose tensors the slices refer to: the traced one or one of the same architecture.
        trace: The record of its trace.

    Returns:
        Groups in the order of the model, and for each tensor with frozen outputs the reason. Units that lie
        along the same dimensions of the same tensors form a group. Units that are outputs of no contraction,
        nor columns of embeddings alone, belong to no group, and units in different parts of a dimension that is
        split to different ones.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    # axes that run over the outputs of a parameter; outputs of buffers are not pruned
    made = {
        (name, dim)
        for name, dim in _axes_with_role(trace, Role.OUTPUT)
        if name in parameters and len(trace.axis_labels[name]) > 1
    }
    columns = {(name, dim) for name, dim in _axes_with_role(trace, Role.COLUMN) - made if name in parameters}
    axes = [(name, dim) for name, labels in trace.axis_labels.items() for dim in range(len(labels))]
    found, frozen = _free_places(trace, axes, made | columns)
    groups = []
    filtered = trace.filtered_in()
    attended, summed = trace.coupled_to_role(Role.HEAD), trace.coupled_to_role(Role.SUMMED)
    read = {(name, dim) for name, dim in _axes_with_role(trace, Role.INPUT) - made if name in parameters}
    scales = {axis for axis in _axes_with_role(trace, Role.SCALE) if len(trace.axis_labels[axis[0]]) == 1}
    for alike in _alike(found, trace.parts()):
        own = [axes[number] for number in numpy.unique(alike.places.axis)]
        outputs = [axis for axis in own if axis in made] or [axis for axis in own if axis in columns]
        if not outputs:
            continue
        first = outputs[0][0]
        least = trace.least(alike.root)
        if alike.size <= least:
            fewer = (
                f"is part of an op that needs {least} units"
                if least > 1
                else "is all one unit, and no layer is emptied"
            )
            frozen.setdefault(first, fewer)
            continue
        slices = _slices({**parameters, **buffers}, axes, alike, scales, read)
        filters = [name for root in numpy.unique(alike.places.root) for name in filtered.get(int(root), ())]
        others = [axis for axis in own if axis not in outputs and axis[0] in parameters]
        # biases, scales and shifts of norms: one element per unit
        single = [axis for axis in others if slices[axis].scalar and not slices[axis].reads]
        groups.append(
            UnitGroup(
                name=first.rpartition(".")[0] or first,
                slices=tuple(slices[axis] for axis in (*outputs, *single)),
                followers=tuple(slices[axis] for axis in others if axis not in single),
                buffers=tuple(slices[axis] for axis in own if axis[0] in buffers),
                minimum=least,
                heads=bool(attended[alike.root]),
                summed=bool(summed[alike.root]),
                sized_in=tuple(dict.fromkeys([*(part.module for part in alike.parts), *filters])),
            )
        )
    return Units(unique_names(groups), frozen)


def axis_reasons(trace: TraceRecord, covered: Set[str]) -> dict[str, str]:
    """Return, for each matrix of which something is frozen along a dimension, the reason for the first such.

    Args:
        trace: The record of the trace.
        covered: Names of the matrices that need none.
    """
    reasons = trace.labels.reasons()
    found: dict[str, str] = {}
    for name, axes in trace.axis_labels.items():
        if len(axes) < 2 or name in covered:
            continue
        roots = trace.labels.find(torch.cat([*axes])).tolist()
        why = next((reasons[root] for root in roots if root in reasons), None)
        if why is not None:
            found[name] = why
    return found


def _axes_with_role(trace: TraceRecord, role: Role) -> set[_AxisKey]:
    """Return the axes along which a label has this role."""
    flags = trace.has_role(role)
    return {
        (name, dim)
        for name, axes in trace.axis_labels.items()
        for dim, labels in enumerate(axes)
        if flags[labels].any()
    }


def _free_places(
    trace: TraceRecord, axes: Iterable[_AxisKey], made: Set[_AxisKey]
) -> tuple[_Places, dict[str, str]]:
    """Return the places whose units may be pruned, and why others may not.

    Args:
        trace: The record of the trace.
        axes: All axes.
        made: The axes that run over the outputs of a parameter.

    Returns:
        The places, and the name of each parameter with frozen outputs mapped to the reason.
    """
    reasons = trace.labels.reasons()
    stuck = numpy.zeros(len(trace.labels), dtype=bool)
    stuck[list(reasons)] = True
    # no row of a weight that no pass takes, as of positions beyond the length of the example
    makes = (trace.coupled_to_role(Role.OUTPUT) | trace.coupled_to_role(Role.COLUMN)).numpy()
    found = [_Places(*numpy.zeros((3, 0), dtype=int))]
    frozen: dict[str, str] = {}
    for number, (name, dim) in enumerate(axes):
        roots = trace.labels.find(trace.axis_labels[name][dim]).numpy()
        kept = stuck[roots]
        if (name, dim) in made and kept.any():
            frozen.setdefault(name, reasons[int(roots[kept.argmax()])])
        index = numpy.flatnonzero(~kept & makes[roots])
        found.append(_Places(roots[index], numpy.full_like(index, number), index))
    return _Places(*map(numpy.concatenate, zip(*found, strict=True))), frozen


def _alike(places: _Places, parts: Mapping[int, tuple[Part, ...]]) -> Iterator[_Alike]:
    """Yield the units that form a group, in the order of the model.

    Args:
        places: The places of all units: places of one root are one unit.
        parts: The parts in which units lie, by root.
    """
    roots, first, unit = numpy.unique(places.root, return_index=True, return_inverse=True)
    order = first.argsort()  # of units, by their first place
    roots, unit = roots[order], order.argsort()[unit]
    count = int(places.axis.max(initial=0)) + 1
    # each axis of each unit once, for a unit may have several indices along it
    lines = numpy.divmod(numpy.unique(unit * count + places.axis), count)
    numbers = {(): 0} | {own: number for number, own in enumerate(dict.fromkeys(parts.values()), 1)}
    split = numpy.array([numbers[parts.get(root, ())] for root in roots.tolist()] if parts else 0)
    kinds = _kinds(*lines, numpy.broadcast_to(split, roots.shape))
    for chosen in _divided(kinds[unit], int(kinds.max(initial=-1)) + 1):
        members, units = numpy.unique(unit[chosen], return_inverse=True)
        taken = _Places(*(each[chosen] for each in places))
        root = int(roots[members[0]])
        yield _Alike(root, parts.get(root, ()), len(members), units, taken)


def _kinds(owners: NDArray[Any], values: NDArray[Any], kinds: NDArray[Any]) -> NDArray[Any]:
    """Return a number for each owner, the same one for those that have the same values and were of one kind.

    Args:
        owners: For each value the number of its owner, in ascending order; each owner has at least one.
        values: Numbers from 0.
        kinds: The kinds that the owners are of before.

    Returns:
        Numbers from 0, in the order in which the kinds occur first.
    """
    starts = numpy.searchsorted(owners, numpy.arange(len(kinds) + 1))
    counts = numpy.diff(starts)
    many, kinds = int(values.max(initial=0)) + 1, kinds * (int(counts.max(initial=0)) + 1) + counts
    turn, left = 0, numpy.arange(len(counts))
    while len(left := left[counts[left] > turn]):
        fresh = int(kinds.max()) + 1
        pairs = numpy.unique(kinds[left], return_inverse=True)[1] * many + values[starts[left] + turn]
        kinds[left] = fresh + numpy.unique(pairs, return_inverse=True)[1]
        turn += 1
    _, first, kinds = numpy.unique(kinds, return_index=True, return_inverse=True)
    return numpy.argsort(numpy.argsort(first))[kinds]


def _divided(kinds: NDArray[Any], count: int) -> list[NDArray[Any]]:
    """Return for each of the kinds 0 to ``count - 1`` where it stands in an array."""
    if not count:
        return []
    return numpy.split(kinds.argsort(kind="stable"), numpy.bincount(kinds, minlength=count).cumsum()[:-1])


def _slices(
    tensors: Mapping[str, Tensor],
    axes: Sequence[_AxisKey],
    alike: _Alike,
    scales: Set[_AxisKey],
    read: Set[_AxisKey],
) -> dict[_AxisKey, AxisSlice]:
    """Return the slice of a group's units along each axis.

    Args:
        tensors: Parameters and buffers by name.
        axes: All axes.
        alike: The units.
        scales: The axes of the scales of batch norms.
        read: The axes of parameters that a contraction sums over, and that are not outputs.
    """
    slices = {}
    numbers, starts = numpy.unique(alike.places.axis, return_index=True)
    lines = zip(*(numpy.split(each, starts[1:]) for each in (alike.places.place, alike.units)), strict=True)
    for number, (index, units) in zip(numbers, lines, strict=True):
        name, dim = axis = axes[number]
        row = numpy.full(tensors[name].shape[dim], -1)
        row[index] = units
        places = torch.from_numpy(row).to(tensors[name].device)
        slices[axis] = AxisSlice(name, tensors[name], dim, places, scale=axis in scales, reads=axis in read)
    return slices


def unique_names(groups: Iterable[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Return the groups with a number appended to names that occur again, as in ``name[2]``."""
    groups = list(groups)
    taken = {group.name for group in groups}
    seen = set[str]()
    named = []
    for group in groups:
        name = group.name
        if name in seen:
            numbered = (f"{group.name}[{number}]" for number in itertools.count(2))
            name = next(each for each in numbered if each not in taken)
        taken.add(name)
        seen.add(name)
        named.append(group if name == group.name else replace(group, name=name))
    return tuple(named)
