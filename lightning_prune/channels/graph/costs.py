"""What units save, in parameters and multiply-adds, on all sides of what they are coupled to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.units.budgets import Axis, Budget, Term
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices


def budgets(
    model: nn.Module, traces: Sequence[TraceRecord], groups: Sequence[tuple[UnitGroup, int]]
) -> dict[str, Budget]:
    """What a network costs as units go.

    Args:
        model: Whose parameters.
        traces: Of the same pass, each with its own way to split dimensions.
        groups: Each with the number of the trace that it was found in.

    Returns:
        Budgets in "params" and "macs".
    """
    main = traces[0]
    owner = _owners(main, groups)
    known: dict[tuple[int, ...], Axis] = {}

    def line(labels: Tensor) -> Axis:
        key = tuple(labels.tolist())
        if key not in known:
            places: dict[str, list[int]] = defaultdict(list)
            for label in key:
                if label in owner:
                    group, unit, _ = owner[label]
                    places[group].append(unit)
            parts = tuple((group, torch.tensor(index)) for group, index in places.items())
            known[key] = Axis(len(key), len(key) - sum(map(len, places.values())), parts)
        return known[key]

    def view(labels: Tensor) -> int:
        """The last trace in which one of these was found to be free."""
        return max((owner[label][2] for label in labels.tolist() if label in owner), default=0)

    params = [
        Term(parameter.numel(), tuple(map(line, main.places.get(name, ()))))
        for name, parameter in model.named_parameters()
    ]

    # heads and what lies within share a dimension, which each has in a trace of its own
    macs = []
    for same in zip(*(trace.terms for trace in traces), strict=True):
        lines = [
            labels for number, (_, found, _) in enumerate(same) for labels in found if view(labels) == number
        ]
        macs.append(Term(same[0][0], tuple(map(line, lines))))
    return {"params": Budget(params), "macs": Budget(macs)}


def _owners(trace: TraceRecord, groups: Sequence[tuple[UnitGroup, int]]) -> Mapping[int, tuple[str, int, int]]:
    """Label to group name, unit and the number of the trace."""
    owner = {}
    for group, number in groups:
        for part in axis_slices((*group.masked, *group.buffers)):
            assert part.index is not None
            labels = trace.places[part.name][part.dim].tolist()
            for label, unit in zip(labels, part.index.tolist(), strict=True):
                if unit >= 0:
                    owner[label] = (group.name, unit, number)
    return owner
