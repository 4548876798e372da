"""Probes: passes of a model on fixed data, and helpers to run them and to compare their outputs."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

_Module = TypeVar("_Module", bound=nn.Module)


class Probe(ABC):
    """Runs a model once, always on the same data.

    Attributes:
        further_passes: Probes that the model must also run without an error; their outputs are not compared.
    """

    further_passes: Sequence[Probe] = ()

    @abstractmethod
    def __call__(self, model: nn.Module) -> Any:
        """Run the model on the data and return its output; pass a copy if a pass changes its state."""

    @abstractmethod
    def to(self, target: torch.dtype | torch.device) -> Probe:
        """Return a probe with the floating-point tensors cast to a dtype, or all tensors moved to a device."""


class ForwardProbe(Probe):
    """Calls ``forward`` of a model with fixed arguments.

    Args:
        example: A tensor, a tuple of positional arguments of ``forward``, or a mapping of keyword arguments.
        keywords: Further keyword arguments.
        further_passes: Further probes that the model must also run without an error.

    Attributes:
        arguments: The positional arguments of ``forward``.
        keywords: The keyword arguments of ``forward``.
    """

    def __init__(
        self, example: Any, keywords: Mapping[str, Any] | None = None, further_passes: Sequence[Probe] = ()
    ) -> None:
        self.further_passes = tuple(further_passes)
        self.keywords = dict(keywords or {})
        if isinstance(example, Mapping):
            self.arguments: tuple[Any, ...] = ()
            self.keywords |= example
        else:
            self.arguments = example if isinstance(example, tuple) else (example,)

    def __call__(self, model: nn.Module) -> Any:
        """Return the outputs of the model."""
        return model(*self.arguments, **self.keywords)

    def to(self, target: torch.dtype | torch.device) -> ForwardProbe:
        """Return this probe, and its further probes, with the arguments cast or moved."""
        probe = self.with_further_passes(*(other.to(target) for other in self.further_passes))
        probe.arguments = cast_or_move(self.arguments, target)
        probe.keywords = cast_or_move(self.keywords, target)
        return probe

    def with_further_passes(self, *passes: Probe) -> ForwardProbe:
        """Return this probe with other further probes."""
        probe = copy.copy(self)
        probe.further_passes = passes
        return probe


class Deadline:
    """A time limit for tracing a model and trying cuts on it.

    Args:
        seconds: The time until the limit, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise ValueError if the time limit has passed."""
        if time.monotonic() > self._end:
            raise ValueError(
                f"max_seconds={self._seconds!r} were not enough to follow the example through the model and try"
                " what may be cut: give a smaller example, or allow more."
            )


def as_probe(example: Any) -> Probe:
    """Return the example if it is a probe, otherwise a probe that calls ``forward`` with it."""
    return example if isinstance(example, Probe) else ForwardProbe(example)


def cast_or_move(data: Any, target: torch.dtype | torch.device) -> Any:
    """Cast the floating-point tensors of a pytree to a dtype, or move all its tensors to a device."""

    def transferred(leaf: Any) -> Any:
        wanted = torch.is_tensor(leaf) and (isinstance(target, torch.device) or leaf.is_floating_point())
        return leaf.to(target) if wanted else leaf

    return tree_map(transferred, data)


def to_model(example: Any, model: nn.Module) -> Any:
    """Move an example to the device of a model's first parameter; cast floating-point tensors to its dtype."""
    parameter = next(model.parameters())
    return cast_or_move(cast_or_move(example, parameter.device), parameter.dtype)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients; restore training modes and random state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def math_attention() -> Iterator[None]:
    """Run a block with unfused attention: fused kernels hide parameters and multiply-adds from tracing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def relative_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference between tensors, which may have any type.

    Each difference is relative to the largest absolute value of its tensor in ``expected``.

    Args:
        expected: The reference tensors.
        found: The tensors to compare with them.

    Returns:
        The largest relative difference; inf if numbers or shapes differ, or a difference is nan.
    """
    if [each.shape for each in expected] != [each.shape for each in found]:
        return math.inf
    worst = 0.0
    for one, other in zip(map(_comparable, expected), map(_comparable, found), strict=True):
        if one.numel():
            scale = one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            difference = float((one - other).abs().max() / scale)
            worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _comparable(tensor: Tensor) -> Tensor:
    """Return the tensor, in double precision if it holds integers or truth values."""
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()
