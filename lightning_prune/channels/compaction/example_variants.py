"""Variants of an example: smaller ones; other values, another batch size, another length or image size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_prune.channels.compaction.perturbation import is_mask
from lightning_prune.core.probes import Probe, tensors_in

# larger values first: they tell more, as where attention to all positions is nearly equal
_FACTORS = (3, 0.9)
_DIVISORS = (4, 2)
_LARGE = 32  # sizes from here on are made smaller first, since a larger input takes longer


def variant_that_runs(probe: Probe, runs: Callable[[Probe], bool]) -> Probe | None:
    """Return a probe with other inputs of as many kinds as a model takes; ``None`` if it takes no other.

    Values change first, then each size that the tensors have, one after the other. All dimensions of equal size
    change together, as the height and the width of images do, or a sequence and its mask. What the model does
    not run on stays.

    Args:
        probe: Runs the model on the example.
        runs: Returns whether the model runs with a probe, and gives numbers.
    """
    found = None
    for factor in _FACTORS:
        variant = probe.map_tensors(partial(_other_values, factor=factor))
        if runs(variant):
            found = variant
            break
    for size in _sizes(probe):
        for other in _other_sizes(size):
            variant = (found or probe).map_tensors(partial(_resized, size=size, other=other))
            if runs(variant):
                found = variant
                break
    return found


def reduce_sizes(probe: Probe, runs_alike: Callable[[Probe], bool]) -> None:
    """Try smaller and smaller inputs, as long as a model runs the same way on them.

    Args:
        probe: Runs the model on the example.
        runs_alike: Returns whether the model runs with a probe as it does on the example.
    """
    for size in _sizes(probe):
        for factor in _DIVISORS:
            # at least two: a dimension of one is another case in many a forward
            while (other := size // factor) > 1:
                variant = probe.map_tensors(partial(_resized, size=size, other=other))
                if not runs_alike(variant):
                    break
                probe, size = variant, other  # noqa: PLW2901


def _sizes(probe: Probe) -> list[int]:
    """Return the sizes of the dimensions of a probe's tensors, each once, the largest first."""
    sizes = {size for tensor in tensors_in(probe) if not tensor.is_nested for size in tensor.shape}
    return sorted(sizes, reverse=True)


def _other_sizes(size: int) -> Iterator[int]:
    if size >= _LARGE:
        yield size // 2
    if size >= 1:
        yield size + 1
    if size > 1:
        yield 2 * size


def _other_values(tensor: Tensor, factor: float) -> Tensor:
    """Return the values of a tensor in other places, numbers times a factor; integers stay in range.

    Masks stay: with a first position that is hidden, causal attention of that position has nothing to look at.
    """
    if tensor.layout is not torch.strided or not tensor.ndim or is_mask(tensor) or _is_binary(tensor):
        return tensor
    rolled = tensor.roll(1, -1)
    return rolled * factor if tensor.is_floating_point() or tensor.is_complex() else rolled


def _is_binary(tensor: Tensor) -> bool:
    """Return whether a tensor holds truth values, or integers that are 0 or 1, as masks of padding do."""
    number = tensor.is_floating_point() or tensor.is_complex()
    return not number and bool(((tensor == 0) | (tensor == 1)).all())


def _resized(tensor: Tensor, size: int, other: int) -> Tensor:
    """Return a tensor whose dimensions of a size have another one: cut off, or repeated from the start.

    A causal mask stays one: a model may tell attention that it is.
    """
    if tensor.is_nested:
        return tensor
    if tensor.shape[-2:] == (size, size) and (values := _causal(tensor)) is not None:
        later = torch.ones(other, other, dtype=torch.bool, device=tensor.device).triu(1)
        return torch.where(later, values[1], values[0]).expand(*tensor.shape[:-2], other, other)
    for dim, length in enumerate(tensor.shape):
        if length == size:
            tensor = tensor.index_select(dim, torch.arange(other, device=tensor.device) % size)
    return tensor


def _causal(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the two values of a causal mask: one up to the diagonal, another above; ``None`` if it is none."""
    later = torch.ones(tensor.shape[-2:], dtype=torch.bool, device=tensor.device).triu(1)
    below, above = tensor[..., ~later].flatten(), tensor[..., later].flatten()
    if not len(above) or not (below == below[0]).all() or not (above == above[0]).all() or below[0] == above[0]:
        return None
    return below[0], above[0]
