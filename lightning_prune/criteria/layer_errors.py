"""Criteria of the error that a layer is left with when the rest of its weights make up for what goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_counts, is_integer, is_number
from lightning_prune.core.probes import evaluation_mode, math_attention
from lightning_prune.core.progress import progress_bar
from lightning_prune.criteria.base import Criterion
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.layer_matrices import LayerCall, LayerMatrix, named_matrices
from lightning_prune.statistics.reconstruction.least_squares import (
    cholesky,
    gigabytes,
    inverse_factor,
    pieces,
    summed_products,
)
from lightning_prune.statistics.reconstruction.lockstep import run_in_step, run_of
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice


@dataclass(frozen=True, repr=False)
class OptimalBrainSurgeon(Criterion):
    r"""Error of the layer's outputs if the unit went and the other weights made up for it.

    For a single weight :math:`w_{ij}^2 / [H^{-1}]_{jj}`, with :math:`H = E[x x^T]` of the layer's inputs on
    calibration batches, and the sum of these for a block; for a channel, or a head, the sum over the layers
    that read it of :math:`tr(W_S [(H^{-1})_{SS}]^{-1} W_S^T)`, with S the columns that it feeds. Higher = keep.
    Errors are in units of the outputs of each layer: compare them within a layer, or with
    ``Global(normalize="l2")``. Of a layer that runs several times in a pass the first call counts.

    It goes with :class:`Reconstruct`, which gives the other weights the values that make up for it. Neither
    labels nor gradients are needed. Beside ``NofM(n, m)`` weights are scored from one column to the next, with
    those before it removed and made up for: with ``Reconstruct`` that is SparseGPT. Hassibi and Stork 1993,
    "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon"; Frantar, Singh and Alistarh 2022,
    "Optimal Brain Compression", arXiv 2208.11580; Frantar and Alistarh 2023, "SparseGPT", arXiv 2301.00774.

    Args:
        batches: How many training batches a fit keeps for it, the first ones, at least 1. In a loop of your own
            those that are given to ``prune`` count.
        ridge: Added to the diagonal of H, as a share of its mean, above 0.
        positions: How many positions of a feature map count for each image, at least 1.
        max_gigabytes: Memory that one layer may take, in 10^9 bytes, above 0. Layers that would take more stay.
        pattern: The ``(n, m)`` for which weights are scored in turn; ``None`` scores each alone. A pruner with
            ``NofM(n, m)`` sets it.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs = Needs.CALIBRATION
    sums = ("score",)
    pointwise = False

    batches: int = 8
    ridge: float = 0.01
    positions: int = 40
    max_gigabytes: float = 4.0
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, positions=self.positions)
        for name in ("ridge", "max_gigabytes"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a number above 0.")
        if self.pattern is not None and not (
            isinstance(self.pattern, tuple)
            and len(self.pattern) == 2
            and all(map(is_integer, self.pattern))
            and 0 < self.pattern[0] < self.pattern[1]
        ):
            raise ValueError(f"pattern={self.pattern!r} must be (n, m) with n above 0 and below m, or None.")

    @property
    def held(self) -> int:
        """Number of calibration batches."""
        return self.batches

    def for_pattern(self, n: int, m: int) -> OptimalBrainSurgeon:
        """Return the criterion that scores weights in turn."""
        return replace(self, pattern=(n, m))

    def refuses(self, group: UnitGroup) -> str | None:
        """Return a reason if no layer reads the units."""
        return None if group.readers else f"{self!r} needs a layer that reads the units"

    def refuses_layers(self, group: UnitGroup, matrices: Sequence[LayerMatrix]) -> str | None:
        """Return a reason if no layer that reads the units can be calibrated in ``max_gigabytes``."""
        if not matrices:
            return f"{self!r} needs a linear, convolution, attention or recurrent layer that reads the units"
        least = min(map(gigabytes, matrices))
        over = least > self.max_gigabytes
        return f"{self!r} needs {least:.3g} GB for it, above max_gigabytes" if over else None

    def calibrate(
        self,
        groups: Sequence[UnitGroup],
        kept: Mapping[str, Tensor],
        model: nn.Module,
        calibration: Calibration,
    ) -> dict[str, dict[str, Tensor]]:
        """Return the errors of the units of each group that a layer of a known kind reads."""
        network = copy_model(model).requires_grad_(requires_grad=False)
        work = _Errors(self, network, groups, kept, calibration)
        with evaluation_mode(network), math_attention():
            run_in_step([[run_of(probe, network)] for probe in calibration.passes], work.readers, work.arrive)
        return {name: {"score": calibration.agreed(score)} for name, score in work.scores.items()}

    def score(self, group: UnitGroup, statistics: Statistics) -> Tensor:
        """Return the errors of the last calibration."""
        return statistics.mean("score")


@dataclass
class _Errors:
    """The errors of all groups, which are added up over the layers that read them, as a pass comes to these.

    Args:
        criterion: The criterion.
        network: The network that runs.
        groups: The unit groups.
        kept: Group name to a bool mask of its units.
        calibration: The passes.

    Attributes:
        readers: Name of each layer to the groups that it reads, with its matrix and the slice of the weight.
        scores: Group name to errors.
    """

    criterion: OptimalBrainSurgeon
    network: nn.Module
    groups: Sequence[UnitGroup]
    kept: Mapping[str, Tensor]
    calibration: Calibration
    readers: dict[str, list[tuple[UnitGroup, AxisSlice, LayerMatrix]]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        known = named_matrices(self.network)
        found = defaultdict(list)
        for group in self.groups:
            for reader in group.readers:
                if reader.name in known:
                    place, matrix = known[reader.name]
                    if gigabytes(matrix) <= self.criterion.max_gigabytes:
                        found[place].append((group, reader, matrix))
        self.readers = dict(found)
        self._steps = progress_bar(found, "Calibrate", count=len(found))

    def arrive(self, place: str, calls: Sequence[Sequence[LayerCall]]) -> None:
        """Add the errors of a layer, at its first call."""
        if place in self._done:
            return
        self._done.add(place)
        next(self._steps, None)
        systems: dict[str, list[Tensor]] = {}
        for group, reader, matrix in self.readers[place]:
            if reader.name not in systems:
                systems[reader.name] = self._systems(matrix, [call for (call,) in calls])
            if not all(bool(each.isfinite().all()) for each in systems[reader.name]):
                continue  # no rows, or inf or nan: the group is not scored
            found = self._errors(group, reader, matrix, systems[reader.name]).to(group.dtype)
            self.scores[group.name] = self.scores[group.name] + found if group.name in self.scores else found

    def _systems(self, matrix: LayerMatrix, calls: Sequence[LayerCall]) -> list[Tensor]:
        """Return H with a ridge for each group of a matrix."""
        batches = (map(_without_outputs, matrix.rows(call, self.criterion.positions)) for call in calls)
        systems = []
        for total in summed_products(batches, self.calibration.add_up):
            square = total.squares / total.count
            mean = square.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
            systems.append(square + self.criterion.ridge * mean * torch.eye(len(square)).to(square))
        return systems

    def _errors(
        self, group: UnitGroup, reader: AxisSlice, matrix: LayerMatrix, systems: Sequence[Tensor]
    ) -> Tensor:
        """Return the errors of the units of a group in one layer that reads them."""
        weights = matrix.matrix(matrix.parameter).double()
        pairs = list(zip(weights, systems, strict=True))
        if group.input_dim is None:
            columns = matrix.matrix(_unit_numbers(reader))[:, 0]
            each = [
                _errors_of_sets(weight, torch.cholesky_inverse(cholesky(system)), numbers, group.size)
                for (weight, system), numbers in zip(pairs, columns, strict=True)
            ]
            return torch.stack(each).sum(0)
        if self.criterion.pattern is None or not group.divisible:
            single = [
                weight.square() / torch.cholesky_inverse(cholesky(system)).diagonal()
                for weight, system in pairs
            ]
        else:
            alive = matrix.matrix(self.kept[group.name])
            # consecutive inputs are those of one position of the kernel
            kernel = prod(matrix.parameter.shape[2:])
            order = torch.arange(weights.shape[-1]).view(-1, kernel).t().flatten().to(weights.device)
            single = [
                _errors_in_turn(
                    weight[:, order], system[order][:, order], mask[:, order], self.criterion.pattern
                )[:, order.argsort()]
                for (weight, system), mask in zip(pairs, alive, strict=True)
            ]
        (part,) = group.slices
        return part.sum(matrix.weight(torch.stack(single)))


def _without_outputs(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of rows of inputs, with no outputs: H is of inputs alone."""
    return ((inputs, inputs.new_zeros(len(inputs), 0)) for (inputs,) in pieces(rows))


def _unit_numbers(reader: AxisSlice) -> Tensor:
    """Return the number of the unit that each element of a weight reads; -1 where there is none."""
    size = reader.weight.shape[reader.dim]
    numbers = torch.arange(size) if reader.index is None else reader.index
    last = reader.weight.ndim - 1 - reader.dim
    return numbers.to(reader.weight.device).view(-1, *(1 for _ in range(last))).expand(reader.weight.shape)


def _errors_of_sets(weight: Tensor, inverse: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Return the error without the columns of each unit, if the others make up for them.

    Args:
        weight: Of shape outputs x columns.
        inverse: The inverse of H.
        numbers: The number of the unit of each column; -1 where there is none.
        size: Number of units.
    """
    errors = weight.new_zeros(size)
    counts = numbers[numbers >= 0].bincount(minlength=size)
    order = numbers.argsort(stable=True)[int((numbers < 0).sum()) :]
    starts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        units = (counts == count).nonzero().flatten()
        columns = order[starts[units][:, None] + torch.arange(count, device=units.device)]
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        parts = weight[:, columns].permute(1, 2, 0)
        errors[units] = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return errors


def _errors_in_turn(weight: Tensor, system: Tensor, kept: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return the errors of weights, block by block, with those before removed to a pattern and made up for.

    Args:
        weight: Of shape outputs x columns, a multiple of m.
        system: H of these columns.
        kept: Bool, of the weight's shape.
        pattern: How many of how many consecutive columns are kept.
    """
    n, m = pattern
    inverse = inverse_factor(system)
    weight, errors = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[1], m):
        block = slice(start, start + m)
        errors[:, block] = weight[:, block].square() / inverse.diagonal()[block].square()
        best = errors[:, block].masked_fill(~kept[:, block], -torch.inf)
        # of equal errors the earlier is kept, as by the selector
        gone = best.argsort(dim=1, descending=True, stable=True)[:, n:] + start
        removed = torch.zeros_like(kept).scatter_(1, gone, value=True)
        for column in range(start, start + m):
            loss = weight[:, column] * removed[:, column] / inverse[column, column]
            weight[:, column:] -= torch.outer(loss, inverse[column, column:])
    return errors
