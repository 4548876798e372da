"""Layers that standardise their weight over its inputs: those that were cut still count in the variance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_prune.channels.compaction.narrow_classes import NarrowForm, NarrowModule
from lightning_prune.channels.compaction.norm_forms import (
    at_least_single,
    close,
    scales_and_types,
    takes_one_tensor,
)

Formula: TypeAlias = Callable[[Tensor, int, float], Tensor]


@dataclass(frozen=True)
class Standardised(NarrowForm):
    """What such a layer computes, by a weight of which inputs that were 0 may have been cut.

    Args:
        formula: Given the weight, the number of all elements of a filter, and epsilon, returns the standardised
            weight.
        eps: The constant that is added to what is divided by, or under its root.
        factor: What the standardised weight is multiplied by.
        gain: Name of a parameter that it is multiplied by, too, with an element an output; "" if there is none.
        same: Whether zeros are added around the input as TensorFlow does for ``padding="SAME"``.
        width: The number of all inputs of a filter.
        whole: The class of the layer before any were cut.
    """

    formula: Formula
    eps: float
    factor: float
    gain: str
    same: bool
    width: int
    whole: type[nn.Module]

    def weight(self, layer: nn.Module, filters: int | None = None) -> Tensor:
        """Return the weight that a layer multiplies by, or its first filters."""
        own = cast(Tensor, layer.weight)[:filters] if filters else cast(Tensor, layer.weight)
        wide = at_least_single(own)
        found = self.formula(wide, self.width * own.shape[2:].numel(), self.eps) * self.factor
        if self.gain:
            gain = cast(Tensor, getattr(layer, self.gain)).view([-1] + [1] * (own.ndim - 1))
            found = found * (gain[:filters] if filters else gain)
        return found.to(own.dtype)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the output of a layer."""
        if isinstance(layer, _ConvNd):
            padded = _padded(layer, x) if self.same else x
            result: Tensor = layer._conv_forward(padded, self.weight(layer), layer.bias)
            return result
        return functional.linear(x, self.weight(layer), cast("nn.Linear", layer).bias)

    def left(self, module: nn.Module) -> int:
        """Return how many inputs of a filter are left."""
        return cast(Tensor, module.weight).shape[1]

    def narrow_class(self, module: nn.Module) -> type[NarrowModule]:
        """Return the class of a layer that computes by the formula."""
        return next(narrow for kind, narrow in _NARROW.items() if isinstance(module, kind))


class NarrowStandardised(NarrowModule):
    """A layer with a standardised weight, after some of its inputs were cut."""

    form: Standardised

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, with the mean and the variance of all inputs, of which those that went are 0."""
        return self.form(self, x)

    def extra_repr(self) -> str:
        """Return the settings, how many inputs of a filter are left, of how many, and of what."""
        left = f"{self.form.left(self)} of {self.form.width}"
        return f"{super().extra_repr()}, inputs={left}, {self.form.whole.__name__}"


class NarrowLinear(NarrowStandardised, nn.Linear):
    """A linear layer of this kind."""


class NarrowConv1d(NarrowStandardised, nn.Conv1d):
    """A convolution of this kind over sequences."""


class NarrowConv2d(NarrowStandardised, nn.Conv2d):
    """A convolution of this kind over images."""


class NarrowConv3d(NarrowStandardised, nn.Conv3d):
    """A convolution of this kind over volumes."""


_NARROW: dict[type[nn.Module], type[NarrowStandardised]] = {
    nn.Linear: NarrowLinear,
    nn.Conv1d: NarrowConv1d,
    nn.Conv2d: NarrowConv2d,
    nn.Conv3d: NarrowConv3d,
}


def by_variance(weight: Tensor, count: int, eps: float) -> Tensor:
    """Divide by the root of the variance of each filter, the mean subtracted.

    As batch norm does; Brock et al. 2021, "Characterizing Signal Propagation to Close the Performance Gap in
    Unnormalized ResNets", ICLR.
    """
    apart, squares = _apart(weight, count)
    return apart * (squares / count + eps).rsqrt()


def by_deviation(weight: Tensor, count: int, eps: float) -> Tensor:
    """Divide by the standard deviation of each filter, without bias, the mean subtracted.

    Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization".
    """
    apart, squares = _apart(weight, count)
    least = torch.finfo(weight.dtype).tiny  # a root has no gradient at 0
    return apart / ((squares / (count - 1)).clamp_min(least).sqrt() + eps)


def _apart(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a weight without the mean of each filter, and the sums of squares of all of its elements."""
    dims = tuple(range(1, weight.ndim))
    mean = weight.sum(dims, keepdim=True) / count
    apart = weight - mean
    squares = apart.square().sum(dims, keepdim=True)
    return apart, squares + (count - weight.shape[1:].numel()) * mean.square()


def _padded(layer: _ConvNd, x: Tensor) -> Tensor:
    """Return the input with so many zeros that the output has the size of the input, divided by the stride."""
    amounts: list[int] = []
    lines = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for size, kernel, stride, dilation in reversed([*lines]):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        amounts += [total // 2, total - total // 2]
    return functional.pad(x, amounts)


_FORMULAS: tuple[Formula, ...] = (by_variance, by_deviation)
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-10, 1e-12)  # of layers that keep it in no attribute
_FEW = 4


def may_standardise(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a convolution with code of its own, and holds no more."""
    plain = next((kind for kind in _NARROW if isinstance(module, kind)), None)
    if plain is None or type(module).forward is plain.forward or type(module).__module__.startswith("torch."):
        return False
    if (
        not takes_one_tensor(module)
        or any(True for _ in module.children())
        or any(True for _ in module.buffers())
    ):
        return False
    names = [name for name, each in module._parameters.items() if each is not None]
    return "weight" in names and len(names) <= 2 + ("bias" in names)


@torch.no_grad()
def standardised(module: nn.Module) -> Standardised | None:
    """Return what a layer with code of its own computes; ``None`` if it standardises no weight in a known way.

    A copy of it has to give what the formula does for a few inputs, with other weights, in both modes, in
    double precision and in the type that it has.

    Args:
        module: One that :func:`may_standardise`.
    """
    try:
        drawn, own = _drawn(module), cast(Tensor, module.weight).dtype
        samples = [_Sample(module, drawn, scale, dtype) for scale, dtype in scales_and_types(own)]
        for form in map(samples[0].with_factor, _forms(module)):
            # first few filters: a network has many large layers
            if all(each.fits(form, whole=whole) for whole in (False, True) for each in samples):
                return form
        return None
    except Exception:  # a user's forward may raise anything
        return None


def _forms(module: nn.Module) -> Iterator[Standardised]:
    """Yield what a layer may compute, but for a factor."""
    gain = next((name for name in module._parameters if name not in ("weight", "bias")), "")
    width = cast(Tensor, module.weight).shape[1]
    kept = (value for value in vars(module).values() if type(value) is float)
    ways = (False, True) if isinstance(module, _ConvNd) else (False,)
    for formula, eps, same in product(_FORMULAS, dict.fromkeys((*kept, *_USUAL_EPS)), ways):
        yield Standardised(formula, eps, 1.0, gain, same, width, type(module))


def _drawn(module: nn.Module) -> list[Tensor]:
    """Return random values for the parameters of a layer: of its weight around 0, of others around 1.5."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(each.shape, generator=generator)
        if name == "weight"
        else 1 + torch.rand(each.shape, generator=generator)
        for name, each in module.named_parameters()
    ]


class _Sample:
    """An input of a layer with weights of some size, the weights that it multiplies by, and its outputs.

    Args:
        module: The layer.
        drawn: Values of its parameters.
        scale: What those of its weight are multiplied by.
        dtype: The type of both.
    """

    def __init__(self, module: nn.Module, drawn: Iterable[Tensor], scale: float, dtype: torch.dtype) -> None:
        self._layer = copy.deepcopy(module).to(dtype)
        weight = cast(Tensor, self._layer.weight)
        for each, values in zip(self._layer.parameters(), drawn, strict=True):
            each.copy_(values).mul_(scale if each is weight else 1)
        shape = [1, weight.shape[1]]
        if isinstance(module, _ConvNd):
            shape[1] *= module.groups
            # small, and not of one size, so that it shows where zeros are added around the input
            lines = zip(module.kernel_size, module.dilation, strict=True)
            shape += [(size - 1) * step + 3 + place for place, (size, step) in enumerate(lines)]
        self._input = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        self._outputs = []
        with _Multiplied() as multiplied:
            for training in (False, True):
                self._outputs.append(type(module).forward(self._layer.train(training), self._input))
        self._weights = multiplied.weights

    def with_factor(self, form: Standardised) -> Standardised:
        """Return a form with the factor that the layer's weight has beside that of the form."""
        found = form.weight(self._layer, _FEW)
        return replace(form, factor=float((self._weights[0][:_FEW] * found).sum() / found.square().sum()))

    def fits(self, form: Standardised, *, whole: bool) -> bool:
        """Return whether a form gives a few filters, or all outputs, to the rounding errors of the type."""
        if whole:
            output = form(self._layer, self._input)
            return all(close(each, output) for each in self._outputs)
        expected = form.weight(self._layer, _FEW)
        return len(self._weights) == 2 and all(close(each[:_FEW], expected) for each in self._weights)


class _Multiplied(TorchFunctionMode):
    """Collects the weights of convolutions and linear layers that run.

    Attributes:
        weights: The weights, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        if func in (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d):
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))
