"""Probes: passes of a model on fixed data, and helpers to run them and to compare their outputs."""

from __future__ import annotations

import copy
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.core.dropout_calls import without_chance
from lightning_prune.core.process_state import ProcessState
from lightning_prune.core.recurrent_calls import WholeRecurrentCalls, without_dropout
from lightning_prune.core.tensors import MASKING, cast_or_move_tensor, dense, map_tensors, to_model


class Probe(ABC):
    """Runs a model once, always on the same data.

    Attributes:
        training: Whether the model runs in training mode (see :func:`pass_mode`).
        further_passes: Probes that the model has to go on running, too.
    """

    training = False
    further_passes: Sequence[Probe] = ()

    @abstractmethod
    def __call__(self, model: nn.Module) -> Any:
        """Run the model on the data and return its output; pass a copy if a pass changes its state."""

    @abstractmethod
    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Probe:
        """Return a probe with a function applied to each tensor of its data; further passes stay."""

    def to(self, target: torch.dtype | torch.device) -> Probe:
        """Return a probe with its data, and that of its further passes, cast to a type or moved to a device."""
        probe = self.map_tensors(partial(cast_or_move_tensor, target=target))
        probe.further_passes = tuple(other.to(target) for other in self.further_passes)
        return probe

    @property
    def passes(self) -> tuple[Probe, ...]:
        """This probe and its further passes."""
        return (self, *self.further_passes)

    def in_training_mode(self) -> Probe:
        """Return a probe of the same pass in training mode."""
        probe = copy.copy(self)
        probe.training = True
        return probe

    def with_further_passes(self, passes: Iterable[Probe]) -> Probe:
        """Return this probe with other further passes."""
        probe = copy.copy(self)
        probe.further_passes = tuple(passes)
        return probe


class ForwardProbe(Probe):
    """Calls ``forward`` of a model with fixed arguments.

    Args:
        example: A tensor, a tuple of positional arguments of ``forward``, or a mapping of keyword arguments.
        keywords: Further keyword arguments.

    Attributes:
        arguments: The positional arguments of ``forward``.
        keywords: The keyword arguments of ``forward``.
    """

    def __init__(self, example: Any, keywords: Mapping[str, Any] | None = None) -> None:
        self.keywords = dict(keywords or {})
        if isinstance(example, Mapping):
            self.arguments: tuple[Any, ...] = ()
            self.keywords |= example
        else:
            self.arguments = example if isinstance(example, tuple) else (example,)

    def __call__(self, model: nn.Module) -> Any:
        """Return the outputs of the model."""
        return model(*self.arguments, **self.keywords)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> ForwardProbe:
        """Return a probe with a function applied to each tensor in the arguments."""
        probe = copy.copy(self)
        probe.arguments, probe.keywords = map_tensors((self.arguments, self.keywords), change)
        return probe


class NotFollowedError(ValueError):
    """A model, as it runs on a probe, cannot be followed from op to op.

    Args:
        why: What it does.
        advice: What is left to do.
    """

    def __init__(self, why: str, advice: str = "") -> None:
        super().__init__(f"{why}: {advice}" if advice else why)
        self.why = why


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
    """Return the example if it is a probe, otherwise a probe that calls ``forward`` with it.

    Args:
        example: A probe, a tensor, a tuple of ``forward``'s arguments, a mapping of its keyword arguments, or a
            list of several of these.

    Raises:
        ValueError: If the list is empty.
    """
    if isinstance(example, Probe):
        return example
    if not isinstance(example, list):
        return ForwardProbe(example)
    if not example:
        raise ValueError("example=[]: a list holds one example or several.")
    first, *others = map(as_probe, example)
    return first.with_further_passes(others)


def map_example(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of an example, or of a probe, with a function applied to each tensor in it."""
    return example.map_tensors(change) if isinstance(example, Probe) else map_tensors(example, change)


def tensors_in(example: Any) -> list[Tensor]:
    """Return the tensors in an example or a probe, each once, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_example(example, keep)
    return found


def batch_size(example: Any) -> int:
    """Return the batch size of an example: the length of its first tensor that is not a scalar, otherwise 1."""
    return next((len(tensor) for tensor in tensors_in(example) if tensor.ndim), 1)


def resize_batch(example: Any, size: int) -> Any:
    """Return an example with its batch repeated or cut to a size; tensors with another first dimension stay."""
    before = batch_size(example)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != before:
            return tensor
        return tensor.repeat(-(-size // before), *(1 for _ in tensor.shape[1:]))[:size]

    return map_example(example, resized)


def own_example(model: nn.Module) -> Any:
    """Return the ``example_input_array`` of a LightningModule, as an example; ``None`` if there is none.

    To Lightning, a list is one argument of ``forward``.
    """
    example = getattr(model, "example_input_array", None)
    return (example,) if isinstance(example, list) else example


def example_for(model: nn.Module, example: Any) -> Any:
    """Return an example or, if it is ``None``, a module's own one, on its device; ``None`` if it has none."""
    if example is not None or (own := own_example(model)) is None or next(model.parameters(), None) is None:
        return example
    return to_model(own, model)


def first_example(example: Any) -> Any:
    """Return the first of several examples in a list, or the example itself."""
    return example[0] if isinstance(example, list) else example


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients; restore training modes and random state afterwards."""
    with _mode(model, nn.Module.eval):
        yield


@contextmanager
def pass_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a block without gradients in training or evaluation mode; restore modes and random state afterwards.

    Training mode is that of ordinary training, apart from two things. PyTorch's modules with running
    statistics, such as batch norms, are in evaluation mode: they may need more values than an example has.
    Dropout multiplies by 1, the mean of its random factors: random numbers for a tensor depend on its shape, so
    a smaller network would draw others. A model that is in training mode already keeps the modes of its parts.
    """
    if not training:
        with evaluation_mode(model):
            yield
    else:
        # fused attention has dropout of its own
        with _mode(model, _train_), sdpa_kernel(SDPBackend.MATH), _NoDropout(), _MeanDropout():
            yield


@contextmanager
def _mode(model: nn.Module, set_mode: Callable[[nn.Module], object]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    state = ProcessState.now(devices)
    try:
        with torch.no_grad():
            # one state for all passes: what is drawn decides which way a pass takes
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(0)
            random.seed(0)
            numpy.random.seed(0)
            set_mode(model)
            yield
    finally:
        state.restore()
        for module, mode in modes:
            module.training = mode


def _train_(model: nn.Module) -> None:
    if not model.training:
        model.train()
    for module in model.modules():
        if type(module).__module__.startswith("torch.") and any(
            buffer.is_floating_point() for buffer in module.buffers(recurse=False)
        ):
            module.eval()


class OpMode(TorchDispatchMode):
    """A dispatch mode that sees each op.

    Those that run functions, such as ``torch.cond``, and recurrent layers are one op.
    """

    supports_higher_order_operators = True
    _whole = WholeRecurrentCalls()

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        """Begin to see the ops that run."""
        self._whole.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop seeing them."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._whole.__exit__(*error)  # type: ignore[no-untyped-call]


class _NoDropout(TorchFunctionMode):
    """Calls the functions of dropout, and of attention with dropout, as in evaluation mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = without_chance(func, args, kwargs or {})
        return func(*args, **kwargs)


class _MeanDropout(OpMode):
    """Replaces the other random masks of dropout by their mean; other random numbers stay random."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*without_dropout(func, args), **(kwargs or {}))


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
    before, after = [*map(_comparable, expected)], [*map(_comparable, found)]
    if [each.shape for each in before] != [each.shape for each in after]:
        return math.inf
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        apart = one != other  # infinite values may be equal, too
        if apart.any():
            # numbers that stand for infinity, as in masked scores, say nothing of the scale of the others
            finite = one[one.isfinite() & (apart | (one.abs() < MASKING))].abs()
            scale = max(float(finite.max()) if len(finite) else 0.0, torch.finfo(one.dtype).tiny)
            difference = float((one[apart] - other[apart]).abs().max()) / scale
            worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _comparable(tensor: Tensor) -> Tensor:
    """Return the tensor as a dense one, in double precision if it holds integers or truth values."""
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0)
    tensor = dense(tensor)
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()
