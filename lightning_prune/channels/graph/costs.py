"""Parameters and multiply-adds of a traced model as a function of the units that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    owners = _Owners.of(traces, groups)
    known: dict[bytes, Axis] = {}

    def axis(labels: Tensor) -> Axis:
        """Return one axis for these labels, the same object each time, so that its share is computed once."""
        key = labels.numpy().tobytes()
        if key not in known:
            owned = labels[owners.group[labels] >= 0]
            numbers = owners.group[owned]
            parts = [
                (groups[number][0].name, owners.unit[owned[numbers == number]])
                for number in dict.fromkeys(numbers.tolist())
            ]
            known[key] = Axis(len(labels), len(labels) - len(owned), tuple(parts))
        return known[key]

    def trace_of(labels: Tensor) -> int:
        """Return the greatest trace number among the groups of these labels, 0 if none has a group."""
        numbers = owners.group[labels].unique().tolist()
        return max((groups[number][1] for number in numbers if number >= 0), default=0)

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


class _Owners(NamedTuple):
    """What each label belongs to.

    Attributes:
        group: The number of its group, -1 for none.
        unit: The number of its unit in the group.
    """

    group: Tensor
    unit: Tensor

    @classmethod
    def of(cls, traces: Sequence[TraceRecord], groups: Sequence[tuple[UnitGroup, int]]) -> _Owners:
        """Return the owners of all labels of these traces."""
        count = max(len(trace.labels) for trace in traces)
        found = cls(torch.full((count,), -1), torch.zeros(count, dtype=torch.int64))
        for number, (group, _) in enumerate(groups):
            for part in axis_slices((*group.masked, *group.buffers)):
                assert part.index is not None
                index = part.index.cpu()
                labels = traces[0].axis_labels[part.name][part.dim][index >= 0]
                found.group[labels], found.unit[labels] = number, index[index >= 0]
        return found
