"""Measurement of a network's latency by width, for budgets in time."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_prune.channels.latency.measurement import measure_times
from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.parts import check_counts, check_part
from lightning_prune.core.probes import as_probe, example_for
from lightning_prune.structures.base import Structure
from lightning_prune.structures.channels import Channels
from lightning_prune.structures.coupled import Coupled


def measure_latency(
    model: nn.Module, example: Any = None, structure: Structure = Channels(), batch: int = 1
) -> LatencyTable:
    """Measure the times of a network's layers by width, on the device that it is on, in a minute or two.

    ``Global(budget="latency", table=...)`` takes the table, on any machine.

    Args:
        model: The network; it is not changed. Its weights do not matter, as a rule.
        example: What ``forward`` is called with, as for :class:`Pruner`; by default the ``example_input_array``
            of a LightningModule.
        structure: Finds the units, as it does when the network is pruned.
        batch: The batch size to measure; examples are repeated to make one.

    Raises:
        ValueError: If an argument is wrong, there are no channels or heads to prune, or the network does not
            run on a batch of that size.
    """
    check_part(structure, Structure, "structure")
    check_counts(batch=batch)
    if not isinstance(structure, Coupled):
        raise ValueError(f"structure={structure!r} has units that save no time: take Channels() or Heads().")
    given = example_for(model, example)
    if given is not None:
        given = as_probe(given).to(next(model.parameters()).device)
    return measure_times(model, structure.units(model, given).groups, given, batch)
