"""The budget of measured time: from a table that is measured, or that a user gives."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from os import PathLike
from typing import Any, TypeAlias

from torch import nn

from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.channels.latency.measurement import measure_times
from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.first_process import of_first_process
from lightning_prune.core.parts import check_counts
from lightning_prune.core.probes import as_probe, resize_batch, tensors_in
from lightning_prune.units.groups import Units

Table: TypeAlias = str | PathLike[str] | LatencyTable


def check_timing(budget: str, batch: int | None, table: object) -> None:
    """Check the arguments ``batch`` and ``table`` of a selector.

    Raises:
        ValueError: If one is given and the budget is not "latency", or it has a wrong value.
    """
    given = {name: value for name, value in (("batch", batch), ("table", table)) if value is not None}
    if given and budget != "latency":
        name, value = next(iter(given.items()))
        raise ValueError(f"{name}={value!r} is for budget='latency', and budget is {budget!r}.")
    if batch is not None:
        check_counts(batch=batch)
    if table is not None and not (isinstance(table, str | PathLike | LatencyTable) and table != ""):
        raise ValueError(f"table={table!r} must be the path of a file, or a LatencyTable.")
    if isinstance(table, LatencyTable) and batch not in (None, table.batch):
        raise ValueError(f"batch={batch!r} must be left out or be {table.batch}, that of table={table!r}.")


def timed_units(
    units: Units, model: nn.Module, example: Any, batch: int | None, table: Table | None
) -> tuple[Units, LatencyTable]:
    """Return units with the budget "latency", and the table that it is computed from.

    If there are several processes, all must call this, and take the table of the first one.

    Args:
        units: The unit groups that may be pruned.
        model: Their model; it is not changed.
        example: What ``forward`` is called with, or a probe.
        batch: The batch size; ``None`` for that of the table, or 1.
        table: The table; ``None`` to measure it.

    Raises:
        ValueError: If the table is of another network or batch size, or the model does not run.
    """
    size = 1 if batch is None else batch

    def found() -> LatencyTable:
        if table is None:
            return measure_times(model, units.groups, example, size)
        return table if isinstance(table, LatencyTable) else LatencyTable.load(os.fspath(table))

    taken = of_first_process(found)
    if batch not in (None, taken.batch):
        raise ValueError(f"batch={batch!r} must be left out or be {taken.batch}, that of table={taken!r}.")
    inputs = tensors_in(resize_batch(as_probe(example).passes[0], taken.batch))
    taken.check(units.groups, (tuple(tensor.shape) for tensor in inputs))
    if taken.noise is not None:
        warnings.warn(f"budget='latency': {taken.noise}.", stacklevel=2)
    budget = LatencyBudget(taken, {group.name for group in units.groups})
    return replace(units, budgets={**units.budgets, "latency": budget}), taken
