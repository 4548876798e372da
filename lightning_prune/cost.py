"""What a network costs: multiply-adds on the network that runs, parameters and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.probe import as_probe, evaluating


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
    with evaluating(model), counter:
        probe(model)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    result = {"": counter.get_total_flops() // 2}
    for name, _ in model.named_modules():
        if name:
            result[name] = sum(counts.get(f"{root}.{name}", {}).values()) // 2
    return result


def dense_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, zeros included; what is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_bytes(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Bytes if each masked tensor were stored as one bit a weight and its kept values."""
    saved = 0
    for name, parameter in model.named_parameters():
        if name in masks:
            removed = parameter.numel() - int(masks[name].count_nonzero())
            saved += removed * parameter.element_size() - -(-parameter.numel() // 8)
    return dense_bytes(model) - max(0, saved)
