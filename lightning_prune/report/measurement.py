"""Measures networks for a report: parameters, bytes, multiply-adds, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.report.cost import (
    Cost,
    batch_size,
    dense_bytes,
    latency,
    macs,
    of_size,
    packed_bytes,
    parameters,
)
from lightning_prune.report.report import Layer, Report
from lightning_prune.units.masks import masked_parameters
from lightning_prune.units.shards import Shards, shards_of, to_local

_BATCHES = (1, 64)


def measure(model: nn.Module, masks: Mapping[str, Tensor] | None = None, example: Any = None) -> Report:
    """Measures a network.

    Args:
        model: The network; left as it was.
        masks: Parameter name to bool mask, True where kept, for what pruning covers.
        example: A tensor, or a tuple of ``forward``'s arguments: multiply-adds are those of one example, if
            twice as large a batch takes twice as many, and otherwise of all that is given, as is latency.
            Where processes divide the parameters among them nothing is run, and all of them have to ask.

    Raises:
        ValueError: If a mask belongs to no parameter, or to one of another shape.
    """
    masks = masks or {}
    masked_parameters(model, masks)
    shards = shards_of(model)
    return measure_layers(model, layers_of(masks, shards), None if shards.sharded else example)


def layers_of(masks: Mapping[str, Tensor], shards: Shards) -> tuple[Layer, ...]:
    """What masks leave of each parameter.

    Args:
        masks: Parameter name to bool mask.
        shards: The processes that divide them: all have to ask, and are told the same.
    """
    here = [(int(mask.count_nonzero()), _width(mask)) for mask in map(to_local, masks.values())]
    counts = shards.add_up(torch.tensor(here, dtype=torch.int64).view(-1, 2)).tolist()
    return tuple(
        Layer(name, tuple(mask.shape), mask.numel(), kept, width=width)
        for (name, mask), (kept, width) in zip(masks.items(), counts, strict=True)
    )


def measure_layers(model: nn.Module, layers: tuple[Layer, ...], example: Any = None) -> Report:
    """Measures a network whose masks were looked at before.

    Args:
        model: The network.
        layers: What its masks leave.
        example: As for :func:`measure`.
    """
    total = kept = None
    seconds = {}
    if example is not None:
        counts = _macs_of_one(model, example)
        total = counts[""]
        gone = sum(
            counts.get(layer.name.rpartition(".")[0], 0) * (1 - (layer.kept or 0) / layer.size)
            for layer in layers
            if len(layer.shape) > 1
        )
        kept = round(total - gone)
        seconds = {batch_size(example): latency([model], example)[0]}
    return Report(
        layers=layers,
        params=parameters(model),
        bytes=dense_bytes(model),
        bytes_packed=packed_bytes(model, _kept(layers)),
        macs=total,
        macs_kept=kept,
        latency=seconds,
    )


def measure_compacted(
    report: Report, dense: nn.Module, compacted: nn.Module, masks: Mapping[str, Tensor], example: Any = None
) -> Report:
    """The report of a masked network, with what the compacted one costs, both measured in turn.

    Args:
        report: Of the masked one.
        dense: The network as it was.
        compacted: What is left of it.
        masks: What is left of the masks.
        example: As for :func:`measure`.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in compacted.named_parameters()}
    before, after = _costs([dense, compacted], example)
    return replace(
        report,
        layers=tuple(replace(layer, compacted=shapes[layer.name]) for layer in report.layers),
        dense=before,
        params=after.params,
        bytes=after.bytes,
        bytes_packed=packed_bytes(compacted, {name: int(mask.sum()) for name, mask in masks.items()}),
        macs=after.macs,
        latency=after.latency,
    )


def _costs(models: Sequence[nn.Module], example: Any) -> list[Cost]:
    """What networks cost, timed in turn on batches of several sizes."""
    costs = [Cost(parameters(model), dense_bytes(model)) for model in models]
    if example is None:
        return costs
    seconds = {size: latency(models, of_size(example, size)) for size in _BATCHES}
    return [
        replace(
            cost,
            macs=_macs_of_one(model, example)[""],
            latency={size: times[place] for size, times in seconds.items()},
        )
        for place, (model, cost) in enumerate(zip(models, costs, strict=True))
    ]


def _macs_of_one(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiply-adds of one example of a batch, by module; of all that is given, if it is no batch."""
    found, size = macs(model, example), batch_size(example)
    if size == 1:
        return found
    try:  # not with less: indices would point beyond it
        twice = macs(model, of_size(example, 2 * size))
    except Exception:  # a user's forward may raise anything
        return found
    return {name: count // size for name, count in found.items()} if twice[""] == 2 * found[""] else found


def _kept(layers: Sequence[Layer]) -> dict[str, int]:
    return {layer.name: layer.size if layer.kept is None else layer.kept for layer in layers}


def _width(mask: Tensor) -> int:
    return int(mask.reshape(len(mask), mask[:1].numel()).any(1).count_nonzero()) if mask.ndim else int(mask)
