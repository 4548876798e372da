"""Norms of users' code that divide by a root mean square: channels that were cut still count in the mean."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _ScaleInput:
    """Forward pre-hook of a norm over ``n`` channels that were ``width`` before.

    The mean of the squares of the input times ``(n / width)**0.5`` is their sum divided by ``width``.
    """

    width: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments, the first one scaled."""
        tensor, *others = args
        return (tensor * _factor(tensor, self.width), *others)


@dataclass(frozen=True)
class _ScaleOutput:
    """Forward hook of such a norm, which undoes the scaling of the numerator."""

    width: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output, scaled."""
        return output / _factor(output, self.width)


class OpenNorm(nn.Module):
    """Stands for such a norm where channels are followed: a sum of squares takes in no channel that is 0."""

    def forward(self, tensor: Tensor) -> Tensor:
        """Divide by the root of the sum of squares."""
        (weight,) = self.parameters()
        return tensor * (tensor.square().sum(-1, keepdim=True) + 1).rsqrt() * weight


def own_norms(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, int]:
    """Return the norms whose weights have these names, each with its width."""
    modules = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    return {module: next(module.parameters()).numel() for module in modules if is_own_norm(module)}


def set_scales_(norm: nn.Module, before: int) -> None:
    """Let a norm that was cut count the channels that went; take that back where none is missing any more.

    Args:
        norm: The norm.
        before: Its width before the cut.
    """
    hooks: tuple[dict[int, Any], ...] = (norm._forward_pre_hooks, norm._forward_hooks)
    width = before
    for each in hooks:
        for key, hook in list(each.items()):
            if isinstance(hook, _ScaleInput | _ScaleOutput):
                width = hook.width
                del each[key]
    if next(norm.parameters()).numel() != width:
        # other hooks see inputs and outputs as they are without these
        norm.register_forward_pre_hook(_ScaleInput(width))
        norm.register_forward_hook(_ScaleOutput(width), prepend=True)


@torch.no_grad()
def is_own_norm(module: nn.Module) -> bool:
    """Return whether a module is one of users' code that is right about a part of its channels if it is scaled.

    It has one parameter, with an element a channel. A copy of it is tried, with other weights: without the
    channels that are 0, and scaled, it has to give what it gives with them, and must not do so as it is.
    """
    weights = [*module.parameters()]
    plain = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    if type(module).__module__.startswith("torch.") or not plain or [each.ndim for each in weights] != [1]:
        return False
    width = weights[0].numel()
    generator = torch.Generator().manual_seed(0)
    values, weight = torch.randn(2, 3, width, generator=generator), 1 + torch.rand(width, generator=generator)
    half = width // 2
    values[..., half:] = 0
    try:
        probe = copy.deepcopy(module).double()
        (parameter,) = probe.parameters()

        def run(tensor: Tensor, count: int) -> Tensor:
            parameter.data = weight[:count].to(parameter)
            result: Tensor = type(module).forward(probe, tensor[..., :count].to(parameter))
            return result

        def same(scaled: float, factor: float) -> bool:
            expected, found = run(values * scaled, width), run(values * scaled * factor, half) / factor
            whole = expected.shape == values.shape and not expected[..., half:].any()
            return whole and torch.allclose(found, expected[..., :half], rtol=1e-4, atol=0)

        factor = (half / width) ** 0.5
        # with small inputs the constant under the root counts
        return all(same(scaled, factor) for scaled in (1.0, 1e-3)) and not same(1.0, 1.0)
    except Exception:  # a user's forward may raise anything
        return False


def _factor(tensor: Tensor, width: int) -> float:
    return float((tensor.shape[-1] / width) ** 0.5)
