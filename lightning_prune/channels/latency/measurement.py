"""Measures a table of times: of copies of a network at several widths, in turn with the dense network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from lightning_prune.channels.compaction.plan import make_plan
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.channels.latency.design import colours_of, level_of, widths_of
from lightning_prune.channels.latency.layer_axes import call_axes
from lightning_prune.channels.latency.layer_times import Run, layer_times
from lightning_prune.channels.latency.machine import machine_of
from lightning_prune.channels.latency.module_calls import CallTimes
from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.averages import averages_within
from lightning_prune.core.clock import compute_time, timed
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe, as_probe, evaluation_mode, resize_batch, tensors_in
from lightning_prune.core.progress import progress_bar
from lightning_prune.units.groups import UnitGroup

SECONDS = 60.0  # wanted duration of a measurement
LEVELS = (7, 5, 3)  # numbers of widths, primes; the first that leaves time for the fewest rounds is taken
FEWEST, MOST = 3, 60  # rounds at each combination of widths


def measure_times(model: nn.Module, groups: Sequence[UnitGroup], example: Any, batch: int) -> LatencyTable:
    """Measure the times of a network's layers on the device that it is on, which takes a minute or two.

    The network runs in evaluation mode, as it is: in its data type, with PyTorch's present number of threads.
    Copies that are cut to several widths run in turn with the dense network, so that a load on the machine that
    changes slowly matters little. Medians are taken, and by the table fewer units never take longer.

    Args:
        model: The network; it is not changed.
        groups: Its unit groups.
        example: What ``forward`` is called with, or a probe, whose first pass is timed.
        batch: The batch size.

    Raises:
        ValueError: If the network does not run with this batch size.
    """
    probe = resize_batch(as_probe(example).passes[0], batch)
    dense = copy_model(model)
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a copy
        levels = _levels(_first_seconds(dense, probe, batch))
        widths = {group.name: widths_of(group, levels) for group in groups}
        narrower = {name: max(set(each) - {each[-1]}) for name, each in widths.items() if each[0] < each[-1]}
        sizes = {group.name: group.size for group in groups}
        cuts = (
            (name, kept / sizes[name], _narrow(model, groups, {name: kept})) for name, kept in narrower.items()
        )
        axes = call_axes(dense, probe, cuts)
        colours = colours_of(axes.values(), widths, levels)
        plans = [
            {name: level_of(number, colour, levels) for name, colour in colours.items()}
            for number in range(levels**2)
        ]
        plans.append(dict.fromkeys(widths, levels - 1))
        runs = []
        for plan in progress_bar(plans, "Measure latency"):
            counts = {name: widths[name][level] for name, level in plan.items()}
            smaller = _narrow(model, groups, counts)
            runs.append(_timed_run(dense, smaller, probe, counts, SECONDS / len(plans)))
    table = LatencyTable(
        machine=machine_of(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch=batch,
        inputs=tuple(tuple(tensor.shape) for tensor in tensors_in(probe)),
        groups=sizes,
        dense=median(run.dense for run in runs),
        factor=1.0,
        rest=0.0,
        error=0.0,
        spread=median(run.spread for run in runs),
        layers=layer_times(runs, axes, sizes, colours),
    )
    return _fitted(table, runs)


def _levels(seconds: float) -> int:
    """Return the number of widths of each group, given the seconds of a pass of the dense network."""
    passes = 2 * FEWEST  # in a round three passes run, of which two are of a network half as large
    fits = (each for each in LEVELS if passes * each**2 * seconds <= 2 * SECONDS)
    return next(fits, LEVELS[-1])


def _narrow(model: nn.Module, groups: Sequence[UnitGroup], counts: Mapping[str, int]) -> nn.Module:
    """Return a copy of a model with as many units in its groups as ``counts`` says, the first ones."""
    kept = [(group, torch.arange(group.size) < counts.get(group.name, group.size)) for group in groups]
    smaller = copy_model(model)
    replay_(smaller, make_plan(model, kept, averages_within(model)))
    return smaller


def _first_seconds(dense: nn.Module, probe: Probe, batch: int) -> float:
    """Return the seconds of a second pass, once a first one has warmed up."""
    with evaluation_mode(dense):
        try:
            probe(dense)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(
                f"batch={batch!r}: {type(dense).__name__} does not run on a batch of that size: {error!r}"
            ) from error
        return timed(lambda: probe(dense), compute_time)


def _timed_run(
    dense: nn.Module, smaller: nn.Module, probe: Probe, counts: Mapping[str, int], seconds: float
) -> Run:
    """Time a narrow network in turn with the dense one.

    Args:
        dense: The dense network.
        smaller: The narrow network.
        probe: Runs both.
        counts: The number of units of each group.
        seconds: Wanted duration.
    """
    whole: list[float] = []
    narrow: list[float] = []
    calls: list[CallTimes] = []
    with evaluation_mode(dense), evaluation_mode(smaller):
        probe(smaller)
        begun = time.monotonic()
        while len(calls) < FEWEST or (len(calls) < MOST and time.monotonic() - begun < seconds):
            whole.append(timed(lambda: probe(dense), compute_time))
            narrow.append(timed(lambda: probe(smaller), compute_time))
            calls.append(CallTimes())
            with calls[-1].following(smaller):
                probe(smaller)
    middle = median(narrow)
    return Run(
        counts=counts,
        whole=middle / median(whole),
        spread=median(abs(each - middle) for each in narrow) / middle,
        calls={key: median(each.seconds[key] for each in calls) / median(whole) for key in calls[0].seconds},
        callers=calls[0].caller,
        dense=median(whole),
    )


def _fitted(table: LatencyTable, runs: Sequence[Run]) -> LatencyTable:
    """Return a table with the factor and the rest by which it comes nearest to the times of the whole networks.

    The time of the dense network is met exactly; of the others the squares of the relative differences are
    least.
    """
    budget = LatencyBudget(table, table.groups)
    full = budget.total
    points = [(budget.seconds(run.counts) - full, table.dense * run.whole) for run in runs]
    weights = [(gone / whole, (whole - table.dense) / whole) for gone, whole in points]
    square = sum(gone * gone for gone, _ in weights)
    factor = sum(gone * less for gone, less in weights) / square if square else 1.0
    factor = factor if factor > 0 else 1.0
    rest = table.dense - factor * full
    error = median(abs(rest + factor * (gone + full) - whole) / whole for gone, whole in points)
    return replace(table, factor=factor, rest=rest, error=error)
