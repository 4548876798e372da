"""Parts of a model that are followed alone, on the inputs that they get where the whole cannot be followed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import NotFollowedError, Probe, pass_mode
from lightning_prune.core.tensors import map_tensors, reachable_tensors, tensors_by_name

# what these tell of a tensor stays when a part of it is cut
_PROPERTIES: tuple[Any, ...] = (
    Tensor.device,
    Tensor.dtype,
    Tensor.layout,
    Tensor.is_cuda,
    Tensor.requires_grad,
)
_SAME_WHEN_CUT = {
    *(each.__get__ for each in _PROPERTIES),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}


class _Call(NamedTuple):
    """A call of a part: its name, and the arguments."""

    part: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class PartsProbe(Probe):
    """Calls parts of a model with the arguments that they got in one pass of the whole, in the same order.

    Whatever the rest of the model may read counts as a result: what the calls return, numbers that are no
    tensors included, what they have made of their arguments, and parameters that are read elsewhere.

    Args:
        calls: The calls.
        shared: Names of parameters and buffers of the parts that the rest of the model reads by itself.
        training: Whether the model was in training mode.
    """

    def __init__(self, calls: Sequence[_Call], shared: Sequence[str], *, training: bool) -> None:
        self._calls, self._shared, self.training = calls, shared, training

    def __call__(self, model: nn.Module) -> list[Any]:
        """Return all that the rest of the model may read."""
        calls = map_tensors(self._calls, torch.clone)
        results = [model.get_submodule(part)(*arguments, **keywords) for part, arguments, keywords in calls]
        own = tensors_by_name(model)
        return [results, _numbers(results), calls, [own[name] for name in self._shared]]

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PartsProbe:
        """Return a probe with a function applied to each tensor in the arguments."""
        probe = copy.copy(self)
        probe._calls = map_tensors(self._calls, change)
        return probe


def _numbers(results: Any) -> list[Tensor]:
    """Return the numbers in results that are no tensors, as tensors: they may be computed from weights."""
    kinds = bool | int | float | complex | numpy.number | numpy.ndarray
    found = [numpy.asarray(each) for each in tree_leaves(results) if isinstance(each, kinds)]
    return [torch.as_tensor(each) for each in found if each.dtype.kind in "biufc"]


@dataclass(frozen=True)
class Followed:
    """What of a model is followed: the whole, or parts of it.

    Args:
        probe: Runs that.
        parts: Names of the parts; empty for the whole model.
        elsewhere: Names of the parameters and buffers that the rest of the model was seen to read.
        why: Why the whole model is not followed.
    """

    probe: Probe
    parts: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    why: str = ""

    def outside(self, name: str) -> bool:
        """Return whether a parameter or buffer lies outside of what is followed."""
        return bool(self.parts) and not any(f"{name}.".startswith(f"{part}.") for part in self.parts)


def follow_parts(model: nn.Module, probe: Probe, parts: Sequence[str], why: str = "") -> Followed:
    """Run a copy of a model, and return how to run parts of it alone.

    Args:
        model: Is not changed.
        probe: Runs the model. If none of its passes is in training mode, the first one that runs in that mode,
            too, is run in it as well.
        parts: Names of modules, none of them within another one; none for the whole model.
        why: Why the whole model is not followed.

    Raises:
        NotFollowedError: If no pass calls any of them.
    """
    if not parts:
        return Followed(probe)
    seen = [_observed(model, each, parts) for each in probe.passes]
    if not any(each.training for each in probe.passes):
        seen += _first_in_training(model, probe, parts)
    read = frozenset[str]().union(*(names for _, _, names in seen))
    shared = sorted(_held(model, parts) & read)
    found = [PartsProbe(calls, shared, training=training) for training, calls, _ in seen if calls]
    if not found:
        raise NotFollowedError(f"no pass on the example calls {' or '.join(map(repr, parts))} as a module")
    first, *others = found
    return Followed(first.with_further_passes(others), tuple(parts), read, why)


def find_parts(
    model: nn.Module,
    probe: Probe,
    named: Collection[str],
    check: Callable[[Probe], object],
    refused: NotFollowedError,
) -> Followed:
    """Return the largest parts of a model that can be followed alone and that hold given parameters.

    A module with a single matrix, which has no channels of its own, is none.

    Args:
        model: Is not changed.
        probe: Runs the model, which cannot be followed as a whole.
        named: Names of the parameters.
        check: Raises NotFollowedError if the model cannot be followed on a probe.
        refused: Says why the whole cannot be followed.

    Raises:
        NotFollowedError: If there is no such part.
    """
    found: list[str] = []
    reasons: list[str] = []
    left = _parts_within(model, "", named)
    while left:
        part = left.pop(0)
        try:
            check(follow_parts(model, probe, [part]).probe)
        except NotFollowedError as error:
            if str(error) != str(refused):
                reasons.append(f"{part}: {error}")
            left = _parts_within(model, part, named) + left
        else:
            found.append(part)
    if not found:
        raise NotFollowedError(" Nor can a part be followed alone: ".join([str(refused), *reasons[:1]]))
    return follow_parts(model, probe, found, refused.why)


def _parts_within(model: nn.Module, outer: str, named: Collection[str]) -> list[str]:
    """Return the names of the children of a module that hold parameters of these names, and two matrices."""
    names = (f"{outer}.{name}".lstrip(".") for name, _ in model.get_submodule(outer).named_children())
    return [
        name
        for name in names
        if any(each.startswith(f"{name}.") for each in named)
        and sum(each.ndim > 1 for each in model.get_submodule(name).parameters()) > 1
    ]


def _held(model: nn.Module, parts: Sequence[str]) -> set[str]:
    """Return the names of the parameters and buffers that parts hold."""
    held = {id(each) for part in parts for each in tensors_by_name(model.get_submodule(part)).values()}
    return {name for name, each in tensors_by_name(model).items() if id(each) in held}


class _Observed(NamedTuple):
    """A pass: whether it was in training mode, the calls of parts, and the names of what is read elsewhere."""

    training: bool
    calls: list[_Call]
    read: frozenset[str]


def _observed(model: nn.Module, probe: Probe, parts: Sequence[str]) -> _Observed:
    """Run a pass of a copy of a model.

    Raises:
        NotFollowedError: If it fails.
    """
    twin = copy_model(model)
    reads, calls = _ReadsOutside(), list[_Call]()
    try:
        with _calls_noted(twin, parts, reads, calls), pass_mode(twin, training=probe.training), reads:
            probe(twin)
    except Exception as error:  # a user's forward may raise anything
        raise NotFollowedError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
    tied = _held_by_others(twin, parts)
    own = tensors_by_name(twin)
    read = frozenset(name for name, each in own.items() if id(each) in reads.found or id(each) in tied)
    return _Observed(probe.training, calls, read)


def _first_in_training(model: nn.Module, probe: Probe, parts: Sequence[str]) -> list[_Observed]:
    """Return what the first pass of a probe does that runs in training mode; empty if none does."""
    for each in probe.passes:
        with suppress(NotFollowedError):
            return [_observed(model, each.in_training_mode(), parts)]
    return []


def _held_by_others(model: nn.Module, parts: Sequence[str]) -> set[int]:
    """Return the ``id`` of each tensor of parts that a module outside holds, too, as a tied weight."""
    inside = {id(module) for part in parts for module in model.get_submodule(part).modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    other = {
        id(each) for module in outside for each in (*module._parameters.values(), *module._buffers.values())
    }
    held = {id(each) for part in parts for each in tensors_by_name(model.get_submodule(part)).values()}
    return held & other


class _ReadsOutside(TorchFunctionMode):
    """Notes which tensors are given to functions of torch while no part runs.

    Unlike an op, a call of a function is seen whatever it does, as that of ``tolist`` or of ``shape``.

    Attributes:
        found: The ``id`` of each tensor that was given to a function.
        inside: How many parts run, one within the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()
        self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and func not in _SAME_WHEN_CUT:
            self.found |= {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))


@contextmanager
def _calls_noted(
    model: nn.Module, parts: Sequence[str], reads: _ReadsOutside, calls: list[_Call]
) -> Iterator[None]:
    """Add the calls of parts, in a ``with`` block, to a list, but for those that other parts make."""

    def enter(part: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        reads.inside += 1
        if reads.inside == 1:
            reads.found |= set(map(id, reachable_tensors((args, kwargs))))
            calls.append(_Call(part, *map_tensors((args, kwargs), _copied)))

    def leave(*_: Any) -> None:
        reads.inside -= 1

    handles = []
    for part in parts:
        module = model.get_submodule(part)
        handles += [
            module.register_forward_pre_hook(partial(enter, part), prepend=True, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
