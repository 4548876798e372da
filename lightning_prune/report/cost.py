"""Costs of a model: latency, parameters and bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core import schema
from lightning_prune.core.probes import as_probe, evaluation_mode, map_example, tensors_in

SECONDS = 0.2  # default duration of a latency measurement


@dataclass(frozen=True)
class Cost:
    """The costs of a model.

    Args:
        params: Number of parameters, zeros included.
        bytes: Bytes of all parameters and buffers, stored densely.
        macs: Multiply-adds of a forward pass of one example, zeros included, as ``macs_by_parameter`` counts
            them; ``None`` without an example.
        latency: Batch size to seconds of a forward pass (median of several) on the model's device.
    """

    params: int
    bytes: int
    macs: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)


LATENCY = schema.mapping(schema.number("a number above 0", lambda value: value > 0), key=schema.integer(1))
COST = schema.dataclass_of(
    Cost,
    params=schema.integer(1),
    bytes=schema.integer(1),
    macs=schema.optional(schema.integer()),
    latency=LATENCY,
)


def latency(models: Sequence[nn.Module], example: Any, seconds: float | None = None) -> list[float]:
    """Return the median seconds of a forward pass of each model, over rounds in which each model runs once.

    The models run in evaluation mode and without gradients.

    Args:
        models: The models; they are not changed.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keyword arguments.
        seconds: Duration of the measurement, by default ``SECONDS``; after one warm-up round, at least three
            rounds are measured.
    """
    duration = SECONDS if seconds is None else seconds
    probe = as_probe(example)
    times: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - start < duration:
        for model, own in zip(models, times, strict=True):
            with evaluation_mode(model):
                _wait()
                before = time.perf_counter()
                probe(model)
                _wait()
                own.append(time.perf_counter() - before)
    return [median(own[1:]) for own in times]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def batch_size(example: Any) -> int:
    """Return the batch size of an example: the length of its first tensor that is not a scalar, otherwise 1."""
    return next((len(tensor) for tensor in tensors_in(example) if tensor.ndim), 1)


def resize_batch(example: Any, size: int) -> Any:
    """Return an example with its batch repeated or cut to a size; tensors with another first dimension stay."""
    before = batch_size(example)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != before:
            return tensor
        return tensor.repeat(-(-size // before), *(1 for _ in tensor.shape[1:]))[:size]

    return map_example(example, resized)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, zeros included; a shared tensor counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_bytes(model: nn.Module, kept: Mapping[str, int]) -> int:
    """Return the bytes of a model whose masked parameters are packed: one bit per weight and the kept values.

    A parameter that would be larger packed counts densely.

    Args:
        model: The model, with all its weights.
        kept: Name of each masked parameter to its number of kept weights.
    """
    named = dict(model.named_parameters())
    return dense_bytes(model) - sum(max(0, packing_savings(named[name], left)) for name, left in kept.items())


def packing_savings(parameter: Tensor, kept: int) -> int:
    """Return how many bytes fewer one bit per weight and the kept values take; negative if they take more."""
    return (parameter.numel() - kept) * parameter.element_size() - -(-parameter.numel() // 8)
