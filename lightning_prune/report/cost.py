"""What a network costs: multiply-adds and time on the network that runs, parameters and bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.core import schema
from lightning_prune.core.probes import as_probe, evaluation_mode, math_attention


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Args:
        params: Parameters in all, zeros included.
        bytes: Of parameters and buffers as they are stored.
        macs: Multiply-adds of one example on the network that runs (``torch.utils.flop_counter`` halved);
            ``None`` without an example.
        latency: Size of a batch to seconds of a forward pass, the median of several, where the network is.
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


def macs(model: nn.Module, example: Any) -> dict[str, int]:
    """Multiply-adds of one forward pass, by module: ``torch.utils.flop_counter`` halved.

    The model is run once in evaluation mode, without gradients, and left as it was.

    Args:
        model: What runs.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keywords; counted as it is,
            batch included.

    Returns:
        Module name to multiply-adds within it; "" is the whole model.

    >>> import torch
    >>> macs(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(1, 4))
    {'': 12, '0': 12, '1': 0}
    """
    probe = as_probe(example)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), math_attention(), counter:
        probe(model)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    result = {"": counter.get_total_flops() // 2}
    for name, _ in model.named_modules():
        if name:
            result[name] = sum(counts.get(f"{root}.{name}", {}).values()) // 2
    return result


def latency(models: Sequence[nn.Module], example: Any, seconds: float = 0.2) -> list[float]:
    """Seconds of a forward pass of each model: medians over rounds in which they take turns.

    Args:
        models: What runs, in evaluation mode, without gradients; left as they were.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keywords.
        seconds: How long to measure; there are at least three rounds, after one to warm up.
    """
    probe = as_probe(example)
    times: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    while len(times[0]) < 4 or time.perf_counter() - start < seconds:
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
    """Length of the first dimension of the first tensor."""
    return next((len(leaf) for leaf in tree_leaves(example) if torch.is_tensor(leaf) and leaf.ndim), 1)


def of_size(example: Any, size: int) -> Any:
    """An example repeated, or cut, to a batch of this size."""
    before = batch_size(example)

    def resized(leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or not leaf.ndim or len(leaf) != before:
            return leaf
        return leaf.repeat(-(-size // before), *(1 for _ in leaf.shape[1:]))[:size]

    return tree_map(resized, example)


def parameters(model: nn.Module) -> int:
    """How many there are, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def dense_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, zeros included; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_bytes(model: nn.Module, kept: Mapping[str, int]) -> int:
    """Bytes if each masked tensor were stored as one bit a weight and its kept values, where that is less.

    Args:
        model: With all its weights.
        kept: Parameter name to how many of them are kept.
    """
    named = dict(model.named_parameters())
    return dense_bytes(model) - sum(max(0, packing_saves(named[name], left)) for name, left in kept.items())


def packing_saves(parameter: Tensor, kept: int) -> int:
    """Bytes less if a parameter were stored as one bit a weight and its kept values; below 0 if it is more."""
    return (parameter.numel() - kept) * parameter.element_size() - -(-parameter.numel() // 8)
