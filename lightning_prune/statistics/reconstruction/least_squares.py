"""Least-squares solutions for a matrix of which some entries are 0, from sums of products of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_prune.statistics.reconstruction.layer_matrices import LayerMatrix

_ROWS = 2**12  # that are multiplied at once
_GIGABYTE = 1e9
_EXACT = 2**38  # multiply-adds up to which each row of a matrix gets a solution of its own
_LEAST_RIDGE = 1e-10  # for inputs that depend on each other, which leave more than one solution


@dataclass(frozen=True, eq=False)
class Products:
    """Sums over rows x of inputs and rows y of outputs, in double precision.

    Args:
        count: Number of rows.
        inputs: Sum of x.
        outputs: Sum of y.
        squares: Sum of x x^T.
        products: Sum of y x^T.
    """

    count: Tensor
    inputs: Tensor
    outputs: Tensor
    squares: Tensor
    products: Tensor

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> Products:
        """Return the sums of some rows.

        Args:
            inputs: Of shape rows x columns.
            outputs: Of shape rows x outputs.
        """
        x, y = inputs.double(), outputs.double()
        count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return cls(count, x.sum(0), y.sum(0), x.t() @ x, y.t() @ x)

    def __add__(self, other: Products) -> Products:
        """Return the sums of the rows of both."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        return Products(*(one + another for one, another in pairs))

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, in the order of the arguments."""
        return [getattr(self, each.name) for each in fields(self)]

    def summed(self, add_up: Callable[[Tensor], Tensor]) -> Products:
        """Return the sums over all processes.

        Args:
            add_up: Returns the sum of a tensor over all processes.
        """
        tensors = self.tensors
        total = add_up(torch.cat([each.flatten() for each in tensors]))
        parts = total.split([each.numel() for each in tensors])
        return Products(*(part.view(each.shape) for part, each in zip(parts, tensors, strict=True)))

    def centered(self) -> Products:
        """Return the sums of inputs and outputs less their means."""
        return Products(
            self.count,
            torch.zeros_like(self.inputs),
            torch.zeros_like(self.outputs),
            self.squares - torch.outer(self.inputs, self.inputs) / self.count,
            self.products - torch.outer(self.outputs, self.inputs) / self.count,
        )


def pieces(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of several tensors, as many at a time as are multiplied at once."""
    return zip(*(each.split(_ROWS) for each in rows), strict=True)


def summed_products(
    batches: Iterable[Iterable[Iterable[tuple[Tensor, Tensor]]]], add_up: Callable[[Tensor], Tensor]
) -> Iterator[Products]:
    """Yield the sums of products for each group of a matrix, over all batches and processes.

    Args:
        batches: For each batch and each group the rows of inputs and the rows of outputs, in :func:`pieces`.
        add_up: Returns the sum of a tensor over all processes.
    """
    sums: dict[int, Products] = {}
    for groups in batches:
        for group, found in enumerate(groups):
            for inputs, outputs in found:
                products = Products.of(inputs, outputs)
                sums[group] = sums[group] + products if group in sums else products
    for each in sums.values():
        yield each.summed(add_up)


def solve(sums: Products, matrix: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the matrix that is best among those that are 0 where nothing is kept.

    It minimizes ``|X W^T - Y|^2 + ridge d |W - matrix|^2``, where d is the mean, over the inputs that are not
    always 0, of the sum of their squares. A row for which the least error is not below that of ``matrix``
    without its entries that are not kept is a row of that one.

    Args:
        sums: Sums of products of the inputs and the outputs that are wanted.
        matrix: The matrix before anything was removed, of shape outputs x columns.
        kept: Bool, of the same shape, True for entries that may be other than 0.
        ridge: Weight of the difference from ``matrix``, relative to the inputs.

    Returns:
        A matrix in double precision.
    """
    before = matrix.double() * kept
    diagonal = sums.squares.diagonal()
    used = diagonal > 0
    if not bool(used.any()):
        return before
    penalty = ridge * diagonal[used].mean()
    system = sums.squares + penalty * torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
    wanted = sums.products + penalty * matrix.double()
    patterns, which = kept.unique(dim=0, return_inverse=True)
    after = torch.zeros_like(before)
    cost = int(patterns.sum(1).double().pow(3).sum())
    if cost <= _EXACT:
        for number, pattern in enumerate(patterns):
            columns = pattern.nonzero().flatten()
            rows = (which == number).nonzero().flatten()
            if len(columns):
                factor = cholesky(system[columns][:, columns])
                found = torch.cholesky_solve(wanted[rows][:, columns].t(), factor).t()
                after[rows[:, None], columns] = found
    else:
        after = _swept(system, torch.cholesky_solve(wanted.t(), cholesky(system)).t(), kept)
    better = _errors(sums, after) < _errors(sums, before)
    return torch.where(better[:, None], after, before)


def gigabytes(layer: LayerMatrix) -> float:
    """Return about how much memory the solution for a matrix takes: rows, sums of products, and factors."""
    _, outputs, columns = layer.matrix(layer.parameter).shape
    return 8 * (columns + outputs) * (2 * _ROWS + 6 * columns) / _GIGABYTE


def cholesky(system: Tensor) -> Tensor:
    """Return the Cholesky factor of a symmetric matrix, made positive definite if it is not."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        mean = system.diagonal().mean().clamp_min(_LEAST_RIDGE)  # 0 if no input is ever other than 0
        more = torch.full_like(system.diagonal(), _LEAST_RIDGE * float(mean))
        factor = torch.linalg.cholesky(system + torch.diag(more))
    return factor


def inverse_factor(system: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a matrix.

    The square of its number j on the diagonal is the inverse of the matrix without the rows and columns before
    j, at j.
    """
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(cholesky(system)), upper=True)
    return factor


def _swept(system: Tensor, best: Tensor, kept: Tensor) -> Tensor:
    """Return a matrix with the entries that are not kept at 0, column by column.

    Each column's loss is made up for by the columns after it. Frantar and Alistarh 2023, "SparseGPT", arXiv
    2301.00774.

    Args:
        system: The quadratic form of the error.
        best: The matrix of the least error, with no entry at 0.
        kept: Which entries are kept.
    """
    inverse = inverse_factor(system)
    matrix = best.clone()
    for column in range(matrix.shape[1]):
        loss = matrix[:, column] * ~kept[:, column] / inverse[column, column]
        matrix[:, column:] -= torch.outer(loss, inverse[column, column:])
    return matrix * kept


def _errors(sums: Products, matrix: Tensor) -> Tensor:
    """Return the squared error of each output, less a constant."""
    return ((matrix @ sums.squares) * matrix - 2 * sums.products * matrix).sum(1)
