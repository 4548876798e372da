"""Patches of images: the parts of a convolution's input under its kernel, at some positions of the output."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor


def split_dim(tensor: Tensor, dim: int, parts: int) -> Tensor:
    """Return a view with one dimension divided into equal parts."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])


def sides(module: Any) -> list[int]:
    """Return the zeros before and after each dimension of a convolution's input, as ``F.pad`` takes them."""
    sides: list[int] = []
    for dim, (size, step) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            total = step * (size - 1)
            sides = [total // 2, total - total // 2, *sides]
        else:
            padding = 0 if module.padding == "valid" else module.padding[dim]
            sides = [padding, padding, *sides]
    return sides


def chosen_positions(total: int, positions: int, device: torch.device) -> Tensor:
    """Return the numbers of some of the positions of an image, spread evenly; all if there are no more."""
    return torch.linspace(0, total - 1, min(total, positions), device=device).round().long()


def patches(
    image: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    positions: int,
) -> Tensor:
    """Return the parts of a padded image under the kernel, at some positions of each example.

    Args:
        image: Of shape examples x channels x sizes.
        kernel: Size of the kernel.
        stride: Steps between positions.
        dilation: Steps between elements of the kernel.
        groups: Number of groups of channels.
        positions: How many positions to take, spread evenly; all if there are no more.

    Returns:
        A tensor of shape groups x rows x columns, with a row for each example and position, and a column for
        each channel of a group and element of the kernel.
    """
    sizes = image.shape[2:]
    counts = [
        (size - step * (width - 1) - 1) // each + 1
        for size, width, each, step in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    total = math.prod(counts)
    chosen = chosen_positions(total, positions, image.device)
    corner = torch.zeros_like(chosen)
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    for place, each, step in zip(torch.unravel_index(chosen, counts), stride, strides, strict=True):
        corner = corner + place * each * step
    elements = torch.tensor(list(product(*map(range, kernel))), device=image.device)
    steps = torch.tensor([one * other for one, other in zip(dilation, strides, strict=True)])
    offsets = (elements * steps.to(elements)).sum(1)
    index = (corner[:, None] + offsets).flatten()
    found = split_dim(image.flatten(2)[:, :, index], 2, len(chosen))
    rows = split_dim(found, 1, groups).permute(1, 0, 3, 2, 4)
    return rows.flatten(3).flatten(1, 2)
