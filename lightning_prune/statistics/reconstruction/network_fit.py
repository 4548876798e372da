"""Reconstruction of a network: its layers are solved for one after the other, as passes come to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe, evaluation_mode, math_attention
from lightning_prune.core.progress import progress_bar
from lightning_prune.core.tensors import own_tensors
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.reconstruction.batch_statistics import BatchStatistics, norms_in_training
from lightning_prune.statistics.reconstruction.layer_calls import LayerCalls
from lightning_prune.statistics.reconstruction.layer_matrices import LayerCall, LayerMatrix, named_matrices
from lightning_prune.statistics.reconstruction.least_squares import (
    Products,
    gigabytes,
    pieces,
    solve,
    summed_products,
)
from lightning_prune.statistics.reconstruction.lockstep import run_in_step, run_of
from lightning_prune.statistics.reconstruction.output_distance import output_distance
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.statistics.reconstruction.sum_terms import SumTerms


@torch.no_grad()
def reconstruct_(
    model: nn.Module,
    before: nn.Module,
    masks: Mapping[str, Tensor],
    calibration: Calibration,
    settings: Reconstruct,
) -> dict[str, str]:
    """Give the weights of a masked model new values, by least squares on calibration batches.

    Args:
        model: The model, with masked weights at 0; its weights change in place.
        before: A copy of the model as it was before the event.
        masks: Parameter name to bool mask, True where kept.
        calibration: Passes of the model.
        settings: Ridge, positions and memory.

    Returns:
        Name of each masked matrix that stays as it is, to the reason.

    Raises:
        ValueError: If there is no batch.
    """
    passes = calibration.passes
    check_batches(calibration)
    old, masked, new = (copy_model(each).requires_grad_(requires_grad=False) for each in (before, model, model))
    statistics = BatchStatistics(new, norms_in_training(model))
    work = _Work(old, new, masks, calibration, settings, statistics)
    work.find_layers()
    with evaluation_mode(new), math_attention():
        work.look_at_calls(passes[0])
    with evaluation_mode(old), evaluation_mode(new), math_attention():
        runs = [[run_of(probe, network, work.terms_wanted) for network in (old, new)] for probe in passes]
        for _, after in runs:
            work.statistics.follow(after.network)
        ended = run_in_step(runs, work.layers, work.solve_layer)
    work.note_unreached()
    work.statistics.average(calibration)
    if ended < len(passes):
        calibration.warn(
            f"Reconstruct: {len(passes) - ended} of {len(passes)} batches run other layers than the first one,"
            " and are left out from there on."
        )
    if output_distance(calibration, old, new) <= output_distance(calibration, old, masked):
        work.finish(model)
    else:  # the best of each layer need not be the best of all
        why = "outputs on the calibration data would be further from those before"
        solved = {name: why for matrices in work.layers.values() for name, *_ in matrices}
        work.reasons = {**solved, **work.reasons}
    return work.reasons


def check_batches(calibration: Calibration) -> None:
    """Raise ValueError if there is no batch to reconstruct weights on."""
    if not calibration.passes:
        raise ValueError("batches=[] must be at least one, to reconstruct weights on.")


@dataclass
class _Work:
    """The reconstruction of one model.

    Args:
        old: A copy of the model as it was before the event.
        new: A copy of the masked model.
        masks: Parameter name to bool mask.
        calibration: Passes of the model.
        settings: Ridge, positions and memory.
        statistics: The batch norms of the new network that are in training mode.

    Attributes:
        layers: Name of each layer that has lost something, to its matrices in both networks, with their names.
        reasons: Name of each masked matrix that stays as it is, to the reason.
    """

    old: nn.Module
    new: nn.Module
    masks: Mapping[str, Tensor]
    calibration: Calibration
    settings: Reconstruct
    statistics: BatchStatistics
    layers: dict[str, list[tuple[str, LayerMatrix, LayerMatrix]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    _reached: set[str] = field(default_factory=set)
    _scarce: dict[str, tuple[int, int]] = field(default_factory=dict)
    _norms: dict[str, Any] = field(default_factory=dict)
    _terms: dict[str, SumTerms | None] = field(default_factory=dict)
    _steps: Iterator[object] = field(default_factory=lambda: iter(()))

    def find_layers(self) -> None:
        """Find the layers that have lost something, and why others that have cannot be reconstructed."""
        holders = Counter(id(each) for part in self.new.modules() for each in part._parameters.values())
        known, earlier = named_matrices(self.new), named_matrices(self.old)
        for name, mask in self.masks.items():
            if mask.ndim < 2 or mask.all():
                continue
            if name not in known:
                kind = type(self.new.get_submodule(name.rpartition(".")[0])).__name__
                self.reasons[name] = f"weights of this kind, in a {kind}, are not solved for"
                continue
            place, after = known[name]
            _, before = earlier[name]
            if holders[id(after.parameter)] > 1 or (after.bias is not None and holders[id(after.bias)] > 1):
                self.reasons[name] = "several layers share it, or its bias"
            elif bool(_lost(after.matrix(mask)).any()):
                self.layers.setdefault(place, []).append((name, before, after))
        order = list(known)
        for matrices in self.layers.values():
            matrices.sort(key=lambda each: order.index(each[0]))

    def look_at_calls(self, probe: Probe) -> None:
        """Leave out layers that do not run exactly once in a pass, and see where the outputs of others go."""
        calls = LayerCalls(self.new, self.layers)
        calls.look(partial(probe.map_tensors(torch.clone), self.new))
        for place in list(self.layers):
            if calls.counts[place] != 1:
                why = f"its layer runs {calls.counts[place]} times in a pass"
                self.reasons |= {name: why for name, *_ in self.layers.pop(place)}
        for place in self.layers:
            norm = calls.norm_of(place)
            self._norms[place] = None if norm is None else self.new.get_submodule(norm)
        self._terms = {place: calls.terms_of(place) for place in self.layers}
        self._steps = progress_bar(self.layers, "Reconstruct", count=len(self.layers))

    @property
    def terms_wanted(self) -> set[int]:
        """The numbers of the functions whose results are added to outputs of layers."""
        return {number for terms in self._terms.values() if terms for number in terms.wanted}

    def solve_layer(self, place: str, calls: Sequence[Sequence[LayerCall]]) -> None:
        """Solve for the matrices of a layer, one after the other.

        Args:
            place: The layer's name.
            calls: Its arguments in the old and the new network, for each batch.
        """
        if place in self._reached:
            return
        next(self._steps, None)
        self.statistics.begin()
        self._reached.add(place)
        self._solve_ahead(place, calls)
        for name, before, after in self.layers[place]:
            needed = gigabytes(after)
            moved = any(one.shapes != other.shapes for one, other in calls)
            if self.calibration.anywhere(moved, after.parameter.device):
                self.reasons[name] = "values decide which rows it gets, and it gets others than before"
            elif needed > self.settings.max_gigabytes:
                self.reasons[name] = (
                    f"its solution takes {needed:.3g} GB, above max_gigabytes={self.settings.max_gigabytes!r}"
                )
            else:
                self._solve(name, before, after, calls, place)

    def _solve_ahead(self, place: str, calls: Sequence[Sequence[LayerCall]]) -> None:
        """Solve for the layers whose outputs a layer has to fit, although they run later."""
        terms = self._terms[place]
        for each in terms.layers if terms else ():
            given = [[(call.results.of(each.given), call.results) for call in pair] for pair in calls]
            missing = any(value is None for pair in given for value, _ in pair)
            if not self.calibration.anywhere(missing, next(self.new.parameters()).device):
                ahead = [[LayerCall((value,), {}, results) for value, results in pair] for pair in given]
                self.solve_layer(each.layer, ahead)

    def _solve(
        self,
        name: str,
        before: LayerMatrix,
        after: LayerMatrix,
        calls: Sequence[Sequence[LayerCall]],
        place: str,
    ) -> None:
        """Set a matrix and its bias to the best ones; without a bias, the batch norm after it takes the shift.

        Args:
            name: Name of the parameter that holds the matrix.
            before: The matrix in the old network.
            after: The matrix in the new network.
            calls: The arguments of the layer in both networks, for each batch.
            place: The layer's name.
        """
        kept, bias = after.matrix(self.masks[name]).to(after.parameter.device), after.bias
        norm, terms = self._norms[place], self._terms[place]
        start, shifts, solutions = before.matrix(before.parameter), [], []
        for group, sums in enumerate(self._sums(before, after, calls, terms)):
            columns, count = kept.shape[-1], int(sums.count)
            if not count or not all(bool(each.isfinite().all()) for each in sums.tensors):
                self.reasons[name] = "no batch has rows for it" if not count else "its data has inf or nan"
                return
            if count < columns:
                self._scarce[name] = count, columns
            ridge = self.settings.ridge * max(1.0, columns / max(1, count))
            fitted = sums if bias is None and norm is None else sums.centered()
            solution = solve(fitted, start[group], kept[group], ridge)
            shifts.append((sums.outputs - solution @ sums.inputs) / sums.count)
            solutions.append(solution)
        after.parameter.copy_(after.weight(torch.stack(solutions)).to(after.parameter))
        alive, shift = kept.any(-1).flatten(), torch.cat(shifts)
        if bias is not None:
            assert before.bias is not None
            bias.copy_(torch.where(alive, shift.to(bias) + before.bias, bias))
        elif norm is not None:
            norm.running_mean.sub_(torch.where(alive, shift, 0).to(norm.running_mean))

    def _sums(
        self,
        before: LayerMatrix,
        after: LayerMatrix,
        calls: Sequence[Sequence[LayerCall]],
        terms: SumTerms | None,
    ) -> Iterator[Products]:
        """Return the sums of products of inputs now and outputs wanted, for each group of a matrix."""
        positions, matrices = self.settings.positions, before.matrix(before.parameter).double()

        def groups(one: LayerCall, other: LayerCall) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
            now, then = after.rows(other, positions), before.rows(one, positions)
            sides = (self.old, one.results), (self.new, other.results)
            outputs = partial(before.output_rows, positions=positions)
            nothing: Sequence[Tensor | None] = [None] * len(now)
            changes = nothing if terms is None else terms.change(*sides, outputs) or nothing
            rows = zip(now, then, matrices, changes, strict=True)
            return starmap(_wanted, rows)

        return summed_products((groups(one, other) for one, other in calls), self.calibration.add_up)

    def note_unreached(self) -> None:
        """Give a reason for the layers to which no batch came: all those that would have were left out."""
        for place in self.layers.keys() - self._reached:
            self.reasons |= {name: "no batch came to its layer" for name, *_ in self.layers[place]}

    def finish(self, model: nn.Module) -> None:
        """Copy what has changed to the model, the same numbers in each process, and warn of few rows."""
        norms = [norm for norm in (*self._norms.values(), *self.statistics.norms.values()) if norm is not None]
        changed = {id(each.parameter) for matrices in self.layers.values() for _, _, each in matrices}
        changed |= {id(each.bias) for matrices in self.layers.values() for _, _, each in matrices}
        changed |= {id(each) for norm in norms for each in (norm.running_mean, norm.running_var)}
        for place, module in self.new.named_modules():
            for one, other in zip(own_tensors(model.get_submodule(place)), own_tensors(module), strict=True):
                if id(other) in changed:
                    one.copy_(self.calibration.agreed(other))
        if self._scarce:
            name, (rows, columns) = next(iter(self._scarce.items()))
            more = f", and {len(self._scarce) - 1} more matrices likewise" if len(self._scarce) > 1 else ""
            self.calibration.warn(
                f"Reconstruct: {name} has {rows} rows of calibration data for {columns} inputs{more}: its ridge"
                " is larger for that. More batches or positions give better weights."
            )


def _lost(kept: Tensor) -> Tensor:
    """Return which outputs have lost a part of their weights, but not all."""
    return kept.any(-1) & ~kept.all(-1)


def _wanted(
    now: Tensor, then: Tensor, matrix: Tensor, change: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of the rows of a layer's inputs, and of the outputs that these should give.

    Args:
        now: Inputs, as they are now.
        then: Inputs before.
        matrix: What has given outputs of these, in double precision.
        change: What these outputs have to gain; ``None`` for nothing.
    """
    if change is None:
        yield from ((inputs, earlier.double() @ matrix.t()) for inputs, earlier in pieces(now, then))
    else:
        for inputs, earlier, more in pieces(now, then, change):
            yield inputs, earlier.double() @ matrix.t() + more
