"""A probe: one pass of a model on real data, to trace it, to try a cut on it, and to prove one."""

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
from torch.utils._pytree import tree_leaves, tree_map

_Module = TypeVar("_Module", bound=nn.Module)


class Probe(ABC):
    """Runs a model once, always on the same data.

    Attributes:
        others: Further passes, that have to run but whose results do not count.
    """

    others: Sequence[Probe] = ()

    @abstractmethod
    def __call__(self, model: nn.Module) -> Any:
        """What the model makes of the data; a model that keeps records of its passes is to be a copy."""

    @abstractmethod
    def to(self, target: torch.dtype | torch.device) -> Probe:
        """The same data, its floating-point tensors in another type, or all of them on another device."""


class ForwardProbe(Probe):
    """Calls ``forward``.

    Args:
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of keywords.
        keywords: More of them.
        others: Further passes.

    Attributes:
        arguments: What ``forward`` is given by position.
        keywords: What it is given by name.
    """

    def __init__(
        self, example: Any, keywords: Mapping[str, Any] | None = None, others: Sequence[Probe] = ()
    ) -> None:
        self.others = tuple(others)
        self.keywords = dict(keywords or {})
        if isinstance(example, Mapping):
            self.arguments: tuple[Any, ...] = ()
            self.keywords |= example
        else:
            self.arguments = example if isinstance(example, tuple) else (example,)

    def __call__(self, model: nn.Module) -> Any:
        """The model's outputs."""
        return model(*self.arguments, **self.keywords)

    def to(self, target: torch.dtype | torch.device) -> ForwardProbe:
        """The same arguments."""
        probe = self.with_others(*(other.to(target) for other in self.others))
        probe.arguments = transfer(self.arguments, target)
        probe.keywords = transfer(self.keywords, target)
        return probe

    def with_others(self, *others: Probe) -> ForwardProbe:
        """The same pass, with others that have to run."""
        probe = copy.copy(self)
        probe.others = others
        return probe


class Deadline:
    """A moment that work must not go past.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raises ValueError once it is past."""
        if time.monotonic() > self._end:
            raise ValueError(
                f"max_seconds={self._seconds!r} were not enough to follow the example through the model and try"
                " what may be cut: give a smaller example, or allow more."
            )


def as_probe(example: Any) -> Probe:
    """The probe itself, or one that calls ``forward`` with the example."""
    return example if isinstance(example, Probe) else ForwardProbe(example)


def transfer(data: Any, target: torch.dtype | torch.device) -> Any:
    """Floating-point tensors in a type, or all tensors on a device; anything else as it is."""

    def transferred(leaf: Any) -> Any:
        wanted = torch.is_tensor(leaf) and (isinstance(target, torch.device) or leaf.is_floating_point())
        return leaf.to(target) if wanted else leaf

    return tree_map(transferred, data)


def to_model(example: Any, model: nn.Module) -> Any:
    """An example on a model's device, its floating-point tensors of the model's type."""
    parameter = next(model.parameters())
    return transfer(transfer(example, parameter.device), parameter.dtype)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; modes and random state as before when it ends."""
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
    """Attention in its plain form: fused ones hide their parameters and multiply-adds."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def relative_difference(expected: Any, found: Any) -> float:
    """The largest difference between two results, relative to the largest number; inf if shapes differ."""
    left, right = _floats(expected), _floats(found)
    if [each.shape for each in left] != [each.shape for each in right]:
        return math.inf
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if one.numel():
            scale = one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
            difference = float((one - other).abs().max() / scale)
            worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _floats(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf) and leaf.is_floating_point()]
