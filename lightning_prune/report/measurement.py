"""Measurement of models for a report: parameters, bytes, multiply-adds and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.channels.latency.machine import machine_of
from lightning_prune.core.clock import compute_time
from lightning_prune.core.parts import check_seconds
from lightning_prune.core.probes import batch_size, first_example, resize_batch
from lightning_prune.report.cost import (
    Cost,
    Workload,
    dense_bytes,
    latencies,
    latency,
    packed_bytes,
    parameters,
)
from lightning_prune.report.entries import Layer
from lightning_prune.report.report import Report
from lightning_prune.units.masks import Masks, joined_masks
from lightning_prune.units.shards import Shards, shards_of, to_local


def measure(
    model: nn.Module,
    masks: Masks | None = None,
    example: Any = None,
    *,
    seconds: float = 2.0,
) -> Report:
    """Return a report of a model.

    If the parameters are sharded among processes, all processes must call this, and the example is not run.

    Args:
        model: The model; it is not changed.
        masks: Name to bool mask, True where kept, of each parameter that pruning covers; or a list of several
            such mappings.
        example: A tensor, a tuple of ``forward``'s arguments or a mapping of its keyword arguments, to count
            multiply-adds and measure latency on; of several in a list the first one. Latency is that of a batch
            of 1 and of the whole batch. Multiply-adds are of one example if two take twice as many, otherwise
            of the whole batch.
        seconds: Time limit for all measurements of latency together: at least 0, which measures none. One
            forward pass may exceed it.

    Raises:
        ValueError: If a mask fits no parameter, or ``seconds`` is wrong.
    """
    check_seconds(seconds=seconds)
    joined = joined_masks(model, masks or {})
    shards = shards_of(model)
    work = Workload(None if shards.sharded else first_example(example), seconds=seconds)
    return measure_layers(model, count_kept(joined, shards), work)


def count_kept(masks: Mapping[str, Tensor], shards: Shards) -> tuple[Layer, ...]:
    """Return the numbers of kept weights and of kept rows of each masked parameter.

    Args:
        masks: Parameter name to bool mask, True where kept.
        shards: The processes among which the masks are sharded: all must call this, and get the same result.
    """
    here = [(int(mask.count_nonzero()), _width(mask)) for mask in map(to_local, masks.values())]
    counts = shards.add_up(torch.tensor(here, dtype=torch.int64).view(-1, 2)).tolist()
    return tuple(
        Layer(name, tuple(mask.shape), mask.numel(), kept, width=width)
        for (name, mask), (kept, width) in zip(masks.items(), counts, strict=True)
    )


def measure_layers(model: nn.Module, layers: tuple[Layer, ...], work: Workload) -> Report:
    """Return a report of a model whose masks have been counted by :func:`count_kept`.

    Args:
        model: The model.
        layers: The result of :func:`count_kept`.
        work: What to run the model on.
    """
    total = kept = None
    seconds: dict[int, list[float]] = {}
    if work.example is not None:
        counts = _macs_of_one(model, work.example)
        total = sum(counts.values())
        gone = sum(counts.get(layer.name, 0) * (layer.size - layer.remaining) / layer.size for layer in layers)
        kept = round(total - gone)
        seconds = latencies([model], work)
    return Report(
        layers=layers,
        params=parameters(model),
        bytes=dense_bytes(model),
        bytes_packed=packed_bytes(model, {layer.name: layer.remaining for layer in layers}),
        macs=total,
        macs_kept=kept,
        latency={size: times[0] for size, times in seconds.items()},
    )


def measure_compacted(
    report: Report, dense: nn.Module, compacted: nn.Module, masks: Mapping[str, Tensor], work: Workload
) -> Report:
    """Return the report of a masked model, updated with the costs of the dense and of the compacted model.

    Args:
        report: Report of the masked model.
        dense: The model before compaction.
        compacted: The compacted model.
        masks: Name to mask of each parameter of the compacted model that is still masked.
        work: What to run both models on.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in compacted.named_parameters()}
    target = report.latency_target
    if target is not None and work.example is not None and work.seconds > 0:
        work = replace(work, seconds=work.seconds / 2)
        example = resize_batch(work.example, target.batch)
        first, second = latency([dense, compacted], example, work.seconds, work.seconds, compute_time)
        target = target.met_by(second / first, machine_of(compacted))
    before, after = _costs([dense, compacted], work)
    return replace(
        report,
        latency_target=target,
        layers=tuple(replace(layer, compacted=shapes[layer.name]) for layer in report.layers),
        dense=before,
        bytes_packed=packed_bytes(compacted, {name: int(mask.sum()) for name, mask in masks.items()}),
        **vars(after),
    )


def _costs(models: Sequence[nn.Module], work: Workload) -> list[Cost]:
    """Return the costs of models, with latencies measured in alternation."""
    seconds = {} if work.example is None else latencies(models, work)
    return [
        Cost(
            parameters(model),
            dense_bytes(model),
            None if work.example is None else sum(_macs_of_one(model, work.example).values()),
            {size: times[place] for size, times in seconds.items()},
        )
        for place, model in enumerate(models)
    ]


def _macs_of_one(model: nn.Module, example: Any) -> dict[str, int]:
    """Return multiply-adds by parameter: of one example if they double with the batch, else of the batch."""
    size = batch_size(example)
    # a model may need more examples than one, such as pairs
    for few in sorted({1, size // 2}) if size > 1 else ():
        try:
            found = macs_by_parameter(model, resize_batch(example, few))
            twice = macs_by_parameter(model, resize_batch(example, 2 * few))
        except (
            Exception
        ):  # a user's forward may raise anything, as where indices of an example are out of range
            continue
        if all(twice.get(name, 0) == 2 * count for name, count in found.items()):
            return {name: count // few for name, count in found.items()}
        break
    return macs_by_parameter(model, example)


def _width(mask: Tensor) -> int:
    """Return the number of indices along the first dimension with at least one kept weight."""
    return int(mask.reshape(len(mask), mask[:1].numel()).any(1).count_nonzero()) if mask.ndim else int(mask)
