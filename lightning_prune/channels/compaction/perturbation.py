"""Changes to a copy of a model for trials: noise in all weights, and units in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.calls import tensors_of
from lightning_prune.core.probes import OpMode
from lightning_prune.core.tensors import MASKING, no_number, tensors_by_name
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

_BLOCK = 262_147  # random numbers; a prime, so that no rows of a weight, of whatever length, get the same ones


@torch.no_grad()
def perturb_(model: nn.Module, seed: int = 0) -> None:
    """Add noise to all parameters and buffers, so that no 0 or 1 among them hides a wrong cut.

    Noise is uniform, with an amplitude of 0.01 plus a part of the mean absolute value of the tensor's numbers
    that are not 0: a half for matrices, a tenth for others. Numbers that are 0 get noise of all of that mean,
    so that a masked network looks like a dense one. A tensor with inf, or numbers as large as if they stood for
    it, stays as it is: it is a mask.

    Args:
        model: Is changed.
        seed: Seed of the noise.
    """
    noise = _Noise(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is torch.strided and no_number(tensor) is None and not is_mask(tensor):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            _add_noise_(real, noise, positive=name.endswith("var"))


class _Noise:
    """One block of random numbers, uniform from -1 to 1, that is read again and again: to draw them takes long.

    Args:
        seed: The seed.
    """

    def __init__(self, seed: int) -> None:
        drawn = torch.empty(_BLOCK).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
        self._numbers = drawn.repeat(2)
        self._first = 0
        self._converted: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def next(self, like: Tensor) -> Tensor:
        """Return the next random numbers in the shape, type and place of a tensor of at most one block."""
        key = like.device, like.dtype
        if key not in self._converted:
            self._converted[key] = self._numbers.to(*key)
        first, self._first = self._first, (self._first + like.numel()) % _BLOCK
        return self._converted[key][first : first + like.numel()].view(like.shape)


def is_mask(tensor: Tensor) -> bool:
    """Return whether a tensor has inf, nan or numbers that stand for inf."""
    real = no_number(tensor) is None and not tensor.is_complex() and tensor.layout is torch.strided
    if not real or not tensor.numel():
        return False
    least, largest = torch.aminmax(tensor)  # ten times as fast as a norm
    return not (float(least) > -MASKING and float(largest) < MASKING)  # nor is nan


def _add_noise_(tensor: Tensor, noise: _Noise, *, positive: bool) -> None:
    """Add noise in place, which is positive for running variances: they have to stay above 0."""
    if not tensor.numel():
        return
    filled = int(tensor.count_nonzero())
    wide = torch.promote_types(tensor.dtype, torch.float32)  # the sum of many numbers in half precision is inf
    mean = float(torch.linalg.vector_norm(tensor, 1, dtype=wide)) / max(1, filled)
    spread = (0.5 if tensor.ndim > 1 else 0.1) * mean + 0.01
    for piece in _pieces(tensor):
        drawn = noise.next(piece)
        if positive:
            piece.add_(drawn.abs(), alpha=spread)
        elif filled == tensor.numel():
            piece.add_(drawn, alpha=spread)
        else:
            piece.add_(torch.where(piece == 0, drawn * (mean + spread), drawn * spread))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views that make up a tensor, each of at most one block of random numbers."""
    if tensor.numel() <= _BLOCK:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(_BLOCK)
    else:
        for row in tensor.unbind():
            yield from _pieces(row)


@torch.no_grad()
def reorder_(model: nn.Module, groups: Iterable[UnitGroup]) -> None:
    """Put the units of each group in another order, from a fixed seed: the outputs differ by rounding only.

    Args:
        model: A model of the architecture that the groups were found in.
        groups: Unit groups. Those whose units take up different numbers of places stay as they are, and so do
            experts, whose order the router knows.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_by_name(model)
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        parts = axis_slices((*group.masked, *group.buffers))
        places = [None if part.index is None else _places(part.index.cpu(), group.size) for part in parts]
        if any(each is None for each in places):
            continue
        for part, before in zip(parts, places, strict=True):
            tensor = tensors[part.name]
            assert before is not None
            source = torch.arange(tensor.shape[part.dim])
            source[before.flatten()] = before[order].flatten()
            tensor.data = tensor.data.index_select(part.dim, source.to(tensor.device))


@torch.no_grad()
def scale_(model: nn.Module, factor: float) -> None:
    """Multiply the parameters of several dimensions by a factor.

    Larger weights tell more: attention to all positions is nearly equal with small ones, whatever its heads.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1 and no_number(parameter) is None:
            parameter.mul_(factor)


@torch.no_grad()
def jitter_(model: nn.Module, epsilon: float) -> None:
    """Multiply each weight by a random number, from a fixed seed, between 1 - epsilon and 1 + epsilon."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if no_number(parameter) is None and not parameter.is_complex():
            noise = torch.empty(parameter.shape, dtype=parameter.dtype)
            noise.uniform_(1 - epsilon, 1 + epsilon, generator=generator)
            parameter.data = parameter.data * noise.to(parameter.device)  # a copy may share its memory


class FloatTypes(OpMode):
    """Dispatch mode that finds the narrowest floating-point type that ops give.

    Attributes:
        epsilon: The machine epsilon of that type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epsilon = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op."""
        result = func(*args, **(kwargs or {}))
        for each in tensors_of([result]):
            if each.is_floating_point():
                self.epsilon = max(self.epsilon, torch.finfo(each.dtype).eps)
        return result


def _places(index: Tensor, size: int) -> Tensor | None:
    """Return the places of each unit, of shape (units, places); ``None`` if units have different numbers."""
    counts = index[index >= 0].bincount(minlength=size)
    if (counts != counts[0]).any():
        return None
    return index.argsort(stable=True)[len(index) - int(counts.sum()) :].view(size, -1)
