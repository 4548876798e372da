"""Norms of users' code: channels that were cut still count in what they divide by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_prune.channels.compaction.narrow_classes import NarrowForm, NarrowModule
from lightning_prune.channels.compaction.norm_forms import form_of
from lightning_prune.channels.compaction.standardised import may_standardise, standardised


@dataclass(frozen=True)
class Scales:
    """A norm that divides by a root mean square, in code that runs at any width.

    Args:
        width: The number of all channels.
    """

    width: int

    def open_(self, norm: nn.Module) -> None:
        """Let a norm compute by ops through which channels can be followed."""
        mode = _SumForMean()
        norm.register_forward_pre_hook(_Enter(mode))
        norm.register_forward_hook(_Leave(mode), always_call=True)

    def set_(self, norm: nn.Module) -> None:
        """Let hooks of a norm count the channels that went; remove them where none is missing any more."""
        hooks: tuple[dict[int, Any], ...] = (norm._forward_pre_hooks, norm._forward_hooks)
        for each in hooks:
            for key in _own_hooks(each):
                del each[key]
        if next(norm.parameters()).numel() != self.width:
            # other hooks see inputs and outputs as they are without these
            norm.register_forward_pre_hook(_ScaleInput(self.width))
            norm.register_forward_hook(_ScaleOutput(self.width), prepend=True)


OwnNorm: TypeAlias = Scales | NarrowForm


# what was found, by what it depends on: each trial makes copies of the same norms
_found: dict[Hashable, OwnNorm | None] = {}


def own_norm(module: nn.Module) -> OwnNorm | None:
    """Return what lets a norm of users' code, or a group norm of one group, be narrower; ``None`` for others.

    Such a norm holds nothing but parameters with an element a channel. A layer whose code standardises its
    weight is one as well, of its inputs.
    """
    if isinstance(module, NarrowModule):
        return module.form
    if may_standardise(module):
        return _remembered(module, standardised)
    own = [*module.parameters()]
    holds_more = any(True for _ in module.children()) or any(True for _ in module.buffers())
    width = max((each.numel() for each in own), default=0)
    by_channel = width > 1 and all(max(each.shape, default=0) == each.numel() == width for each in own)
    one_group = isinstance(module, nn.GroupNorm) and module.num_groups == 1
    of_torch = type(module).__module__.startswith("torch.") and not one_group
    if holds_more or not by_channel or of_torch:
        return None
    hooks = _own_hooks(module._forward_hooks)
    if hooks:
        return Scales(max(hook.width for hook in hooks.values()))
    return _remembered(module, lambda norm: Scales(width) if is_root_mean_square(norm) else form_of(norm))


def _remembered(module: nn.Module, find: Callable[[nn.Module], OwnNorm | None]) -> OwnNorm | None:
    """Return what is found of a module, which is remembered for others that compute the same."""
    key = _state(module)
    if key is None or key not in _found:
        with torch.random.fork_rng(devices=()):  # a norm may have dropout
            found = find(module)
        if key is None:
            return found
        _found[key] = found
    return _found[key]


def _state(module: nn.Module) -> Hashable | None:
    """Return what the outputs of a module depend on but for values of its parameters; ``None`` if not known."""
    own = {name: value for name, value in vars(module).items() if name not in _PLAIN}
    listed = (each for value in own.values() for each in (value if type(value) is list else (value,)))
    if not all(isinstance(value, bool | int | float | str | tuple | None) for value in listed):
        return None
    shapes = tuple((name, each.shape, each.dtype) for name, each in module.named_parameters())
    return type(module), shapes, repr(own)


_PLAIN = vars(nn.Module())


def own_norms(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, OwnNorm]:
    """Return the norms whose weights have these names, each with what lets it be narrower."""
    modules = dict.fromkeys(model.get_submodule(name.rpartition(".")[0]) for name in names)
    found = ((module, own_norm(module)) for module in modules)
    return {module: norm for module, norm in found if norm is not None}


def _own_hooks(hooks: Mapping[int, Any]) -> dict[int, _ScaleInput | _ScaleOutput]:
    return {key: hook for key, hook in hooks.items() if isinstance(hook, _ScaleInput | _ScaleOutput)}


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


class _SumForMean(TorchFunctionMode):
    """Computes sums in place of means: a sum of squares takes in no channel that is 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        found = _IN_PLACE.get(func, func)
        return found(*args, **(kwargs or {}))


def _by_sums(input: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:  # noqa: A002
    """Stand for ``functional.rms_norm``, whose arguments these are."""
    result = input * (input.square().sum(-1, keepdim=True) + 1).rsqrt()
    return result if weight is None else result * weight


_IN_PLACE = {torch.mean: torch.sum, Tensor.mean: torch.sum, functional.rms_norm: _by_sums}


@dataclass(frozen=True)
class _Enter:
    """Forward pre-hook that enters a mode."""

    mode: _SumForMean

    def __call__(self, *_: Any) -> None:
        """Enter the mode."""
        self.mode.__enter__()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Leave:
    """Forward hook that leaves the mode, also after an error."""

    mode: _SumForMean

    def __call__(self, *_: Any) -> None:
        """Leave the mode."""
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


@torch.no_grad()
def is_root_mean_square(module: nn.Module) -> bool:
    """Return whether a norm, with one parameter, is right about a part of its channels if it is scaled.

    A copy of it is tried, with other weights: without the channels that are 0, and scaled, it has to give what
    it gives with them, and must not do so as it is.
    """
    weights = [*module.parameters()]
    if [each.ndim for each in weights] != [1]:
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
