"""Costs of a model: latency, parameters and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core import schema
from lightning_prune.core.clock import timed, wall_time
from lightning_prune.core.probes import Probe, as_probe, batch_size, evaluation_mode, resize_batch

SECONDS = 0.2  # default duration of a latency measurement, for one batch size


@dataclass(frozen=True)
class Cost:
    """The costs of a model.

    Args:
        params: Number of parameters, zeros included.
        bytes: Bytes of all parameters and buffers, stored densely.
        macs: Multiply-adds of a forward pass of one example, zeros included, as ``macs_by_parameter`` counts
            them; ``None`` without an example.
        latency: Batch size to seconds of a forward pass (median of several).
    """

    params: int
    bytes: int
    macs: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """What models are run on to measure their costs.

    Args:
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keyword arguments; ``None`` to
            run nothing. An example with a larger batch is cut.
        largest: The largest batch size that is run; ``None`` for that of the example.
        seconds: Time limit for all measurements of latency together; 0 to measure none.
        device: The device to run the models on; ``None`` for the one that they are on.
    """

    example: Any = None
    largest: int | None = None
    seconds: float = 0.0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.example is not None and batch_size(self.example) > self.batch:
            object.__setattr__(self, "example", resize_batch(self.example, self.batch))

    @property
    def batch(self) -> int:
        """The largest batch size that is run, at least 1."""
        return max(1, batch_size(self.example) if self.largest is None else self.largest)


LATENCY = schema.mapping(schema.number("a number above 0", lambda value: value > 0), key=schema.integer(1))
COST = schema.dataclass_of(
    Cost,
    params=schema.integer(1),
    bytes=schema.integer(1),
    macs=schema.optional(schema.integer()),
    latency=LATENCY,
)


def latency(
    models: Sequence[nn.Module],
    example: Any,
    seconds: float | None = None,
    limit: float = math.inf,
    clock: Callable[[], float] = wall_time,
) -> list[float]:
    """Return the median seconds of a forward pass of each model, over rounds in which each model runs once.

    The models run in evaluation mode and without gradients. The first round warms up, and counts only if it is
    the only one.

    Args:
        models: The models; they are not changed.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keyword arguments.
        seconds: Duration of the measurement, by default ``SECONDS``; it has at least four rounds.
        limit: Seconds in which all rounds have to fit. After each round another one as long has to fit, or it
            is the last one.
        clock: Returns the time in seconds.
    """
    duration = SECONDS if seconds is None else seconds
    probe = as_probe(example)
    rounds: list[list[float]] = []
    start = time.perf_counter()
    elapsed = last = 0.0
    while not rounds or (elapsed + last <= limit and (len(rounds) < 4 or elapsed < duration)):
        rounds.append([_seconds(model, probe, clock) for model in models])
        before, elapsed = elapsed, time.perf_counter() - start
        last = elapsed - before
    return [median(times) for times in zip(*(rounds[1:] or rounds), strict=True)]


def latencies(models: Sequence[nn.Module], work: Workload) -> dict[int, list[float]]:
    """Return the latencies of models by batch size: for 1 and for the largest size of the workload.

    A size on which a model does not run is left out, and so is the larger one if the time limit leaves no
    time for it.

    Args:
        models: The models; they are not changed.
        work: The workload, with an example.
    """
    found: dict[int, list[float]] = {}
    end = time.perf_counter() + work.seconds
    sizes = sorted({1, work.batch})
    for place, size in enumerate(sizes):
        left = end - time.perf_counter()
        if left <= sum(found.get(1, ())):  # a larger batch takes at least the time of a smaller one
            break
        with suppress(Exception):  # a user's forward may raise anything
            found[size] = latency(models, resize_batch(work.example, size), limit=left / (len(sizes) - place))
    return found


def _seconds(model: nn.Module, probe: Probe, clock: Callable[[], float]) -> float:
    """Return the seconds of one forward pass."""
    with evaluation_mode(model):
        return timed(lambda: probe(model), clock)


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
