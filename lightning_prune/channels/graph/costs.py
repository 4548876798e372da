"""Parameters and multiply-adds of a traced model as a function of the units that are kept."""

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
    """Return the cost of a model as a function of the units that are kept.

    Args:
        model: The model, whose parameters are counted.
        traces: Traces of the same pass, each with its own ``split`` function.
        groups: Each unit group with the index of the trace that it was found in.

    Returns:
        The budgets "params", in parameters, and "macs", in multiply-adds of one pass.
    """
    main = traces[0]
    owner = _owners(main, groups)
    known: dict[tuple[int, ...], Axis] = {}

    def axis(labels: Tensor) -> Axis:
        """Return one axis for these labels, the same object each time, so that its share is computed once."""
        key = tuple(labels.tolist())
        if key not in known:
            units: dict[str, list[int]] = defaultdict(list)
            for label in key:
                if label in owner:
                    group, unit, _ = owner[label]
                    units[group].append(unit)
            parts = tuple((group, torch.tensor(numbers)) for group, numbers in units.items())
            known[key] = Axis(len(key), len(key) - sum(map(len, units.values())), parts)
        return known[key]

    def trace_of(labels: Tensor) -> int:
        """Return the greatest trace index among the groups of these labels, 0 if none has a group."""
        return max((owner[label][2] for label in labels.tolist() if label in owner), default=0)

    params = [
        Term(parameter.numel(), tuple(map(axis, main.axis_labels.get(name, ()))))
        for name, parameter in model.named_parameters()
    ]

    # heads and the channels within heads share a dimension, so each is taken from the trace that found it
    macs = []
    for same_op in zip(*(trace.op_costs for trace in traces), strict=True):
        factors = [
            labels
            for number, (_, lines) in enumerate(same_op)
            # the least of coupled labels is that of a weight; others may have been made on the way
            for labels in map(traces[number].labels.find, lines)
            if trace_of(labels) == number
        ]
        macs.append(Term(same_op[0][0], tuple(map(axis, factors))))
    return {"params": Budget(params), "macs": Budget(macs)}


def _owners(trace: TraceRecord, groups: Sequence[tuple[UnitGroup, int]]) -> Mapping[int, tuple[str, int, int]]:
    """Map each label to the name of its group, the number of its unit and the index of the trace."""
    owner = {}
    for group, number in groups:
        for part in axis_slices((*group.masked, *group.buffers)):
            assert part.index is not None
            labels = trace.axis_labels[part.name][part.dim].tolist()
            for label, unit in zip(labels, part.index.tolist(), strict=True):
                if unit >= 0:
                    owner[label] = (group.name, unit, number)
    return owner
