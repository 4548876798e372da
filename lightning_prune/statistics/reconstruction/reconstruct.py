"""Reconstruct: the setting by which the weights that are left make up for those that went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import Part, check_counts, is_number
from lightning_prune.core.probes import Probe, evaluation_mode
from lightning_prune.core.tensors import own_tensors
from lightning_prune.statistics.reconstruction.layer_calls import LayerCalls
from lightning_prune.statistics.reconstruction.layer_matrices import LayerMatrix, layer_matrix
from lightning_prune.statistics.reconstruction.least_squares import Products, solve
from lightning_prune.statistics.reconstruction.lockstep import run_in_step


@dataclass(frozen=True, repr=False)
class Reconstruct(Part):
    """Gives the weights that are left new values after an event, by least squares, layer by layer.

    Each layer that has lost inputs or weights gets the weights that best give, on calibration batches, the
    outputs that it gave before the event, from the inputs that it gets now: those of the pruned network, in
    which the layers before it have their new weights. ``|X W^T - Y|^2 + ridge d |W - W0|^2`` is minimized, with
    W0 the weights before, d the mean square of the inputs, and masked entries at 0. A bias is solved for along
    with them; where there is none, and a batch norm alone reads the outputs, its running mean takes the shift.
    Neither labels nor gradients are used.

    Where whole inputs go, and where single weights of small layers do, the solution is exact; in large layers
    columns make up for each other in turn. No layer is left with a larger error than before. He, Zhang and Sun
    2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168; Frantar and Alistarh
    2023, "SparseGPT", arXiv 2301.00774.

    Args:
        ridge: Weight of the difference from the weights before, at least 0; larger for few images.
        positions: How many positions of a feature map count for each image, at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """

    ridge: float = 1e-3
    positions: int = 40

    def __post_init__(self) -> None:
        check_counts(positions=self.positions)
        if not is_number(self.ridge) or self.ridge < 0:
            raise ValueError(f"ridge={self.ridge!r} must be a number of at least 0.")


def reconstruct_(
    model: nn.Module,
    before: nn.Module,
    masks: Mapping[str, Tensor],
    passes: Sequence[Probe],
    settings: Reconstruct,
) -> dict[str, str]:
    """Give the weights of a masked model new values, by least squares on calibration batches.

    Args:
        model: The model, with masked weights at 0; its weights change in place.
        before: A copy of the model as it was before the event.
        masks: Parameter name to bool mask, True where kept.
        passes: A pass of the model for each calibration batch.
        settings: Ridge and positions.

    Returns:
        Name of each masked matrix that stays as it is, to the reason.

    Raises:
        ValueError: If there is no batch, or the passes take different ways through the model.
    """
    if not passes:
        raise ValueError("batches=[] must be at least one, to reconstruct weights on.")
    old, new = (copy_model(each).requires_grad_(requires_grad=False) for each in (before, model))
    layers, reasons = _layers(new, masks)
    with evaluation_mode(old), evaluation_mode(new):
        calls = LayerCalls(new, layers)
        calls.look(partial(_run, passes[0], new))
        for name in list(layers):
            if calls.counts[name] != 1:
                reasons[f"{name}.weight".lstrip(".")] = f"its layer runs {calls.counts[name]} times in a pass"
                del layers[name]

        def arrive(name: str, inputs: Sequence[Tensor]) -> None:
            half = len(inputs) // 2
            given = list(zip(inputs[:half], inputs[half:], strict=True))
            kept = layers[name].matrix(masks[f"{name}.weight".lstrip(".")])
            _solve_layer_(layers[name], old.get_submodule(name), given, kept, calls.norm_of(name), settings)

        runs = [(each, partial(_run, probe, each)) for each in (old, new) for probe in passes]
        run_in_step(runs, layers, arrive)
    changed = {id(module) for name in layers for module in (new.get_submodule(name), calls.norm_of(name))}
    places = [name for name, module in new.named_modules() if id(module) in changed]
    with torch.no_grad():
        for place in places:
            target, source = model.get_submodule(place), new.get_submodule(place)
            for one, other in zip(own_tensors(target), own_tensors(source), strict=True):
                one.copy_(other)
    return reasons


def _run(probe: Probe, model: nn.Module) -> Any:
    return probe.map_tensors(torch.clone)(model)  # a model may write to its inputs


def _layers(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[dict[str, LayerMatrix], dict[str, str]]:
    """Return the layers that have lost something, and why others that have cannot be reconstructed.

    Returns:
        Name of each layer to its matrix; name of each other masked matrix to the reason.
    """
    holders = Counter(id(each) for module in model.modules() for each in module._parameters.values())
    layers: dict[str, LayerMatrix] = {}
    reasons: dict[str, str] = {}
    for name, mask in masks.items():
        if mask.ndim < 2 or mask.all():
            continue
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        layer = layer_matrix(module) if leaf == "weight" else None
        if layer is None:
            reasons[name] = f"it is no weight of a Linear or Conv layer, but of {type(module).__name__}"
        elif holders[id(module.weight)] > 1:
            reasons[name] = "several layers share it"
        elif bool(_lost(layer.matrix(mask)).any()):
            layers[place] = layer
    return layers, reasons


def _lost(kept: Tensor) -> Tensor:
    """Return which outputs have lost a part of their weights, but not all."""
    return kept.any(-1) & ~kept.all(-1)


def _solve_layer_(
    layer: LayerMatrix,
    old: Any,
    given: Sequence[tuple[Tensor, Tensor]],
    kept: Tensor,
    norm: Any,
    settings: Reconstruct,
) -> None:
    """Set weight and bias of a layer to the best ones; without a bias, the batch norm after it takes the shift.

    Args:
        layer: The layer of the pruned network.
        old: The same layer of the network before.
        given: The inputs of the layer in both networks, for each batch.
        kept: The mask of the layer's matrix.
        norm: The batch norm that alone reads the outputs; ``None`` if there is none.
        settings: Ridge and positions.
    """
    module = layer.module
    wanted, before = layer.matrix(old.weight).double(), layer.matrix(module.weight)
    shifts, solutions = [], []
    for group in range(len(kept)):
        sums = _summed(layer, given, group, wanted[group], settings.positions)
        fitted = sums if module.bias is None and norm is None else sums.centered()
        solution = solve(fitted, before[group], kept[group].to(before.device), settings.ridge)
        shifts.append((sums.outputs - solution @ sums.inputs) / sums.count)
        solutions.append(solution)
    module.weight.copy_(layer.weight(torch.stack(solutions)).to(module.weight))
    alive = kept.any(-1).flatten().to(before.device)
    if module.bias is not None:
        module.bias.copy_(torch.where(alive, torch.cat(shifts).to(module.bias) + old.bias, module.bias))
    elif norm is not None:
        norm.running_mean.sub_(torch.where(alive, torch.cat(shifts), 0).to(norm.running_mean))


def _summed(
    layer: LayerMatrix,
    given: Sequence[tuple[Tensor, Tensor]],
    group: int,
    wanted: Tensor,
    positions: int,
) -> Products:
    """Return the sums of products of the inputs now and the outputs before, over all batches."""
    total: list[Tensor] = []
    for old, new in given:
        outputs = layer.rows(old, positions)[group].double() @ wanted.t()
        sums = Products.of(layer.rows(new, positions)[group], outputs)
        parts = [getattr(sums, each.name) for each in fields(Products)]
        total = parts if not total else [one + other for one, other in zip(total, parts, strict=True)]
    return Products(*total)
