"""From labels to unit groups: what is coupled, in which tensors, and what stays, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.trace_record import Role, TraceRecord
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import AxisSlice

_Line = tuple[str, int]  # a tensor's name and a dimension
_Unit = list[tuple[_Line, int]]  # lines, and how far along each


def find_groups(model: nn.Module, trace: TraceRecord) -> Units:
    """The unit groups of a model that was traced.

    Args:
        model: Whose tensors the slices are: the traced one or one of the same architecture.
        trace: What was coupled and frozen.

    Returns:
        Groups in the order of the model, and for each tensor whose outputs stay the reason. Units that lie in
        the same tensors make a group; those that no contraction makes belong to none.
    """
    makers = _makers(model, trace)
    units, frozen = _units(trace, makers)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    alike: dict[tuple[_Line, ...], list[_Unit]] = defaultdict(list)
    for unit in units:
        touched = tuple(dict.fromkeys(line for line, _ in unit))
        if makers.intersection(touched):
            alike[touched].append(unit)
    groups = []
    attended, reading, scales = (
        trace.coupled_to_role(Role.HEAD),
        trace.has_role(Role.INPUT),
        trace.has_role(Role.SCALE),
    )
    read = {
        (name, dim)
        for name, lines in trace.places.items()
        for dim, line in enumerate(lines)
        if reading[line].any()
    }
    scaling = {(name, 0) for name, lines in trace.places.items() if len(lines) == 1 and scales[lines[0]].any()}
    for touched, members in alike.items():
        made = [line for line in touched if line in makers]
        if len(members) == 1:
            frozen.setdefault(made[0][0], "is all one unit, and no layer is emptied")
            continue
        (name, dim), place = members[0][0]
        index = _index({**parameters, **buffers}, touched, members)
        others = [line for line in touched if line not in makers and line[0] in parameters]
        # biases, scales and shifts of norms: one number a unit
        single = [
            (name, dim)
            for name, dim in others
            if parameters[name].numel() == parameters[name].shape[dim] and (name, dim) not in read
        ]
        followers = [line for line in others if line not in single]
        groups.append(
            UnitGroup(
                name=made[0][0].rpartition(".")[0] or made[0][0],
                slices=_slices(parameters, [*made, *single], index, scaling),
                followers=_slices(parameters, followers, index, readers=read),
                buffers=_slices(buffers, (line for line in touched if line[0] in buffers), index),
                heads=bool(attended[trace.places[name][dim][place]]),
            )
        )
    return Units(unique_names(groups), frozen)


def _makers(model: nn.Module, trace: TraceRecord) -> set[_Line]:
    """Lines that run over the outputs of a parameter. What a buffer makes, nothing here prunes."""
    made, parameters = trace.has_role(Role.OUTPUT), dict(model.named_parameters())
    return {
        (name, dim)
        for name, lines in trace.places.items()
        for dim, line in enumerate(lines)
        if name in parameters and len(lines) > 1 and made[line].any()
    }


def _units(trace: TraceRecord, makers: set[_Line]) -> tuple[list[_Unit], dict[str, str]]:
    """What is coupled and may go, and what makes the rest, with the reason."""
    reasons = trace.labels.reasons()
    members: dict[int, _Unit] = defaultdict(list)
    frozen: dict[str, str] = {}
    for name, lines in trace.places.items():
        for dim, line in enumerate(lines):
            for place, root in enumerate(trace.labels.find(line).tolist()):
                if root not in reasons:
                    members[root].append(((name, dim), place))
                elif (name, dim) in makers:
                    frozen.setdefault(name, reasons[root])
    return list(members.values()), frozen


def _index(
    tensors: Mapping[str, Tensor], touched: Iterable[_Line], units: Iterable[_Unit]
) -> dict[_Line, Tensor]:
    """For each place along a line the number of its unit, -1 where it belongs to none."""
    places = {(name, dim): [-1] * tensors[name].shape[dim] for name, dim in touched}
    for number, unit in enumerate(units):
        for line, place in unit:
            places[line][place] = number
    return {line: torch.tensor(index, device=tensors[line[0]].device) for line, index in places.items()}


def _slices(
    tensors: Mapping[str, Tensor],
    lines: Iterable[_Line],
    index: Mapping[_Line, Tensor],
    scaling: Collection[_Line] = (),
    readers: Collection[_Line] = (),
) -> tuple[AxisSlice, ...]:
    return tuple(
        AxisSlice(name, tensors[name], dim, index[name, dim], (name, dim) in scaling, (name, dim) in readers)
        for name, dim in lines
    )


def unique_names(groups: Iterable[UnitGroup]) -> tuple[UnitGroup, ...]:
    """Groups of one layer told apart by a number."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        named.append(group if number == 1 else replace(group, name=f"{group.name}[{number}]"))
    return tuple(named)
