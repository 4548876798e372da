"""Layers as matrix products: the rows that one multiplies by its weight, and its weight as a matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.core.module_kinds import CONV1D, is_a


@dataclass(frozen=True)
class LayerMatrix(ABC):
    """A layer whose outputs are the products of rows, taken from its input, and a matrix, plus a bias.

    Args:
        module: The layer; its parameter ``weight`` holds the matrix.
    """

    module: Any

    @abstractmethod
    def rows(self, given: Tensor, positions: int) -> Tensor:
        """Return the rows that are multiplied by the matrix: of shape groups x rows x columns.

        Args:
            given: The input of the layer.
            positions: How many positions of a feature map are taken of each example, spread evenly.
        """

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as a matrix: of shape groups x outputs of a group x columns."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as a weight; the inverse of :meth:`matrix`."""


class LinearMatrix(LayerMatrix):
    """A linear layer, whose weight is stored outputs first."""

    def rows(self, given: Tensor, positions: int) -> Tensor:
        """Return the input as rows; all positions count."""
        return given.reshape(1, -1, given.shape[-1])

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as it is."""
        return weight[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix as it is."""
        return matrix[0]


class InputsFirstMatrix(LinearMatrix):
    """A linear layer whose weight is stored inputs first, as Hugging Face's ``Conv1D``."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the transposed weight."""
        return weight.t()[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the transposed matrix."""
        return matrix[0].t()


class ConvMatrix(LayerMatrix):
    """A convolution: a row is the part of the input under the kernel at one position of the output."""

    def rows(self, given: Tensor, positions: int) -> Tensor:
        """Return the rows at some positions of each example."""
        module = self.module
        rank = len(module.kernel_size)
        image = given if given.ndim == rank + 2 else given[None]
        if module.padding_mode == "zeros":
            image = F.pad(image, _sides(module))
        else:
            image = F.pad(image, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        return _patches(image, module.kernel_size, module.stride, module.dilation, module.groups, positions)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight with inputs and positions of the kernel as columns."""
        return _split(weight.flatten(1), 0, self.module.groups)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the weight."""
        shape: torch.Size = self.module.weight.shape
        return matrix.flatten(0, 1).reshape(shape)


class TransposedConvMatrix(LayerMatrix):
    """A transposed convolution: a convolution, by the flipped kernel, of the input with zeros in between."""

    def rows(self, given: Tensor, positions: int) -> Tensor:
        """Return the rows at some positions of each example."""
        module = self.module
        rank = len(module.kernel_size)
        image = given if given.ndim == rank + 2 else given[None]
        sizes = [(size - 1) * step + 1 for size, step in zip(image.shape[2:], module.stride, strict=True)]
        spread = image.new_zeros(*image.shape[:2], *sizes)
        where = (slice(None), slice(None), *(slice(None, None, step) for step in module.stride))
        spread[where] = image
        sides: list[int] = []
        for size, step, padding, extra in zip(
            module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
        ):
            before = step * (size - 1) - padding
            sides = [before, before + extra, *sides]
        one = (1,) * rank
        return _patches(
            F.pad(spread, sides), module.kernel_size, one, module.dilation, module.groups, positions
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the flipped weight with inputs and positions of the kernel as columns."""
        parts = _split(weight.flip(*range(2, weight.ndim)), 0, self.module.groups)
        return parts.transpose(1, 2).flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the weight."""
        shape: torch.Size = self.module.weight.shape
        parts = matrix.reshape(*matrix.shape[:2], shape[0] // self.module.groups, *shape[2:]).transpose(1, 2)
        return parts.flatten(0, 1).flip(*range(2, len(shape)))


def layer_matrix(module: nn.Module) -> LayerMatrix | None:
    """Return a layer as a matrix product; ``None`` if it is of no kind that is known."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # nn.MultiheadAttention never calls it
        return None
    if isinstance(module, nn.Linear):
        return LinearMatrix(module)
    if isinstance(module, _ConvTransposeNd):
        return TransposedConvMatrix(module)
    if isinstance(module, _ConvNd):
        return ConvMatrix(module)
    return InputsFirstMatrix(module) if is_a(module, CONV1D) else None


def _split(tensor: Tensor, dim: int, parts: int) -> Tensor:
    """Return a view with one dimension divided into equal parts."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])


def _sides(module: Any) -> list[int]:
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


def _patches(
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
    chosen = torch.linspace(0, total - 1, min(total, positions), device=image.device).round().long()
    corner = torch.zeros_like(chosen)
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    for place, each, step in zip(torch.unravel_index(chosen, counts), stride, strides, strict=True):
        corner = corner + place * each * step
    elements = torch.tensor(list(product(*map(range, kernel))), device=image.device)
    steps = torch.tensor([one * other for one, other in zip(dilation, strides, strict=True)])
    offsets = (elements * steps.to(elements)).sum(1)
    index = (corner[:, None] + offsets).flatten()
    found = _split(image.flatten(2)[:, :, index], 2, len(chosen))
    rows = _split(found, 1, groups).permute(1, 0, 3, 2, 4)
    return rows.flatten(3).flatten(1, 2)
