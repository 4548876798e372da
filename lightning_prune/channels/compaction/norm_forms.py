"""Norms that compute a known formula, whatever their code: channels that were cut still count in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.narrow_classes import NarrowForm, NarrowModule


@dataclass(frozen=True)
class Form(NarrowForm):
    """What a norm computes: a formula over channels, of which those that were cut are 0.

    Args:
        formula: Given an input with channels last, the number of all channels, epsilon, and the parameters,
            one element a channel, returns the output.
        dim: The dimension of the channels in the input.
        eps: The constant that is added to what is divided by, or under its root.
        width: The number of all channels.
        whole: The class of the norm before any were cut.
    """

    formula: Callable[..., Tensor]
    dim: int
    eps: float
    width: int
    whole: type[nn.Module]

    def __call__(self, tensor: Tensor, *parameters: Tensor) -> Tensor:
        """Return the output for channels that are left, and their parameters."""
        wide = at_least_single(tensor).movedim(self.dim, -1)
        result = self.formula(wide, self.width, self.eps, *(each.flatten() for each in parameters))
        return result.movedim(-1, self.dim).to(parameters[0].dtype)

    def left(self, module: nn.Module) -> int:
        """Return how many channels are left of a norm."""
        return next(module.parameters()).numel()

    def narrow_class(self, module: nn.Module) -> type[NarrowModule]:
        """Return the class of a norm that computes by the formula."""
        return NarrowNorm


class NarrowNorm(NarrowModule):
    """A norm of users' code, or a group norm of one group, after some of its channels were cut."""

    form: Form

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of all channels, of which those that went are 0."""
        return self.form(x, *self.parameters())

    def extra_repr(self) -> str:
        """Return how many channels are left, of how many, and of what."""
        return f"{self.form.left(self)} of {self.form.width}, {self.form.whole.__name__}"


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision if it has less: sums of squares need as much."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def layer_norm(x: Tensor, width: int, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Divide by the standard deviation over channels, the mean subtracted."""
    mean = x.sum(-1, keepdim=True) / width
    apart = x - mean
    squares = apart.square().sum(-1, keepdim=True) + (width - x.shape[-1]) * mean.square()
    result = apart * (squares / width + eps).rsqrt() * weight
    return result if bias is None else result + bias


def group_norm(x: Tensor, width: int, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Divide by the standard deviation over channels and positions, the mean subtracted: all are one group."""
    dims, positions = tuple(range(1, x.ndim)), x.shape[1:-1].numel()
    mean = x.sum(dims, keepdim=True) / (width * positions)
    apart = x - mean
    missing = (width - x.shape[-1]) * positions
    squares = apart.square().sum(dims, keepdim=True) + missing * mean.square()
    result: Tensor = apart * (squares / (width * positions) + eps).rsqrt() * weight
    return result if bias is None else result + bias


def rms_norm(x: Tensor, width: int, eps: float, weight: Tensor) -> Tensor:
    """Divide by the root of the mean square over channels."""
    return x * (x.square().sum(-1, keepdim=True) / width + eps).rsqrt() * weight


def response_norm(x: Tensor, width: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply each channel by its norm over positions, divided by the mean of that over channels, and add it.

    Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", CVPR.
    """
    response: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), keepdim=True)
    share = response / (response.sum(-1, keepdim=True) / width + eps)
    result: Tensor = x + x * share * weight + bias
    return result


# by the number of parameters
_FORMULAS = {1: (layer_norm, rms_norm, group_norm), 2: (layer_norm, response_norm, group_norm)}
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # of norms that keep it in no attribute
_SCALES = (1.0, 1e-3, 1e-6)  # with small inputs epsilon counts


@torch.no_grad()
def form_of(module: nn.Module) -> Form | None:
    """Return what a norm of users' code computes; ``None`` if that is no known formula.

    A copy of it has to give what the formula does for a few inputs, with other weights, in both modes, in
    double precision and in the type that it has, on which its epsilon may depend.

    Args:
        module: Its parameters have an element a channel.
    """
    if not takes_one_tensor(module):
        return None
    own = [*module.parameters()]
    width = own[0].numel()
    kept = (value for value in vars(module).values() if type(value) is float)
    forms = [
        Form(formula, dim, eps, width, type(module))
        for formula, eps in product(_FORMULAS.get(len(own), ()), dict.fromkeys((*kept, *_USUAL_EPS)))
        for dim in (-1, 1)
    ]
    for shape in ((2, 3, width), (2, 3, 4, width), (2, width, 3), (2, width, 3, 4)) if forms else ():
        try:
            tried = [_Sample.of(module, shape, *each) for each in scales_and_types(own[0].dtype)]
        except Exception:  # a user's forward may raise anything, as for an input of another rank
            continue
        for form in forms:
            if shape[form.dim] == width and all(each.fits(form) for each in tried):
                return form
    return None


def takes_one_tensor(module: nn.Module) -> bool:
    """Return whether the forward of a module has one argument: what others do, as a gate, no formula knows."""
    return len(signature(type(module).forward).parameters) == 2


def scales_and_types(own: torch.dtype) -> list[tuple[float, torch.dtype]]:
    """Return the scales of samples, each with its type: all in double precision, one in the module's own."""
    found = [(scale, torch.float64) for scale in _SCALES]
    return found if own is torch.float64 else [*found, (_SCALES[1], own)]


def close(found: Any, expected: Tensor) -> bool:
    """Return whether tensors are equal, to rounding errors of their type, or of single precision at least."""
    epsilon = max(1e-6, torch.finfo(expected.dtype).eps)
    return (
        isinstance(found, Tensor)
        and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        and torch.allclose(found, expected, rtol=100 * epsilon, atol=10 * epsilon * float(expected.abs().max()))
    )


class _Sample(NamedTuple):
    """An input of a norm, its parameters, and its outputs in both modes."""

    tensor: Tensor
    parameters: Sequence[Tensor]
    outputs: Sequence[Any]

    @classmethod
    def of(cls, module: nn.Module, shape: Sequence[int], scale: float, dtype: torch.dtype) -> _Sample:
        """Return the sample with an input of this shape, scale and type, and a shift of the same scale."""
        probe = copy.deepcopy(module).to(dtype)
        generator = torch.Generator().manual_seed(0)
        parameters = [*probe.parameters()]
        for number, parameter in enumerate(parameters):
            values = 1 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values * scale if number else values)
        tensor = scale * torch.randn(shape, generator=generator).to(parameters[0])
        outputs = [type(module).forward(probe.train(training), tensor) for training in (False, True)]
        return cls(tensor, parameters, outputs)

    def fits(self, form: Form) -> bool:
        """Return whether a form gives these outputs."""
        expected = form(self.tensor, *self.parameters)
        return all(close(found, expected) for found in self.outputs)
