"""Layers whose zeros make them faster by kernels that PyTorch ships, where a measurement shows it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_seconds
from lightning_prune.core.probes import Probe, as_probe, evaluation_mode, relative_difference
from lightning_prune.core.tensors import check_materialized, no_number, reachable_tensors
from lightning_prune.report.cost import SECONDS, latency
from lightning_prune.report.tables import format_table
from lightning_prune.units.shards import check_unsharded

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative differences of outputs
_TOLERANCE_HALF = 2e-2
_GAIN = 1.1  # the least ratio of seconds that is taken for a gain


@dataclass(frozen=True)
class KernelTrial:
    """A layer with zeros, and what a sparse kernel does for it.

    Args:
        name: Name of the module.
        sparsity: Share of its weights that are 0.
        kernel: The fastest kernel that gives its outputs; ``None`` if none does.
        before: Seconds of the dense layer on what it is given in the example; ``None`` if not measured.
        after: Seconds with the kernel.
        difference: Largest difference of its outputs, relative to the largest absolute value.
        why_not: Why it stays dense; ``None`` if it was converted.
    """

    name: str
    sparsity: float
    kernel: str | None = None
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class SparseKernels:
    """A model in which some layers have sparse kernels.

    Args:
        model: The converted copy, in evaluation mode and for inference only.
        layers: The layers in which weights are 0, in order.
        before: Seconds of a forward pass of the model on the example.
        after: Seconds of a forward pass of the copy.
    """

    model: nn.Module
    layers: tuple[KernelTrial, ...]
    before: float
    after: float

    def table(self) -> str:
        """Return the layers, and the whole model, as a text table."""
        rows = [
            (
                each.name,
                f"{each.sparsity:.2%}",
                each.kernel or "-",
                *map(_milliseconds, (each.before, each.after)),
                "-" if each.difference is None else f"{each.difference:.1e}",
                each.why_not or "converted",
            )
            for each in self.layers
        ]
        rows.append(("all", "", "", *map(_milliseconds, (self.before, self.after)), "", ""))
        head = ("layer", "zeros", "kernel", "dense, ms", "sparse, ms", "difference", "result")
        return format_table(head, rows, 1)


class CSRLinear(nn.Linear):
    """``nn.Linear`` with a weight in the CSR format, which holds the kept values alone; for inference."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` for ``x`` of shape (..., inputs)."""
        rows = x.reshape(-1, self.in_features)
        # F.linear multiplies from the other side, for which the kernels of CSR on CPUs are several times slower
        found = torch.mv(self.weight, rows[0])[None] if len(rows) == 1 else (self.weight @ rows.T).T
        return (found if self.bias is None else found + self.bias).reshape(*x.shape[:-1], self.out_features)


def as_csr(layer: nn.Linear) -> None:
    """Convert a layer to the CSR format, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        weight = layer.weight.detach().to_sparse_csr()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.__class__ = CSRLinear


def _as_semi_structured(layer: nn.Linear) -> None:
    weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    layer.weight = nn.Parameter(weight, requires_grad=False)


def _is_semi_structured(layer: nn.Linear) -> bool:
    """Return whether a GPU holds the layer, and at most 2 of each 4 consecutive inputs have a weight."""
    weight = layer.weight
    return (
        weight.is_cuda and not weight.shape[1] % 4 and bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())
    )


@dataclass(frozen=True)
class _Kernel:
    fits: Callable[[nn.Linear], bool]
    convert: Callable[[nn.Linear], None]


_KERNELS: Mapping[str, _Kernel] = {
    "2:4": _Kernel(_is_semi_structured, _as_semi_structured),
    "CSR": _Kernel(lambda layer: True, as_csr),
}


@torch.no_grad()
def use_sparse_kernels(model: nn.Module, example: Any, *, seconds: float = SECONDS) -> SparseKernels:
    """Return a copy of a masked model in which zeros save time, where they do on this machine.

    Each linear layer with zeros runs on what it is given in the example, in turn with the same layer on a
    sparse kernel: of CSR matrices, or of 2:4 patterns on GPUs that have one
    (``torch.sparse.to_sparse_semi_structured``). It is converted if that takes at most 1 / 1.1 of the time, and
    outputs of the layer and of the model differ by rounding alone: by 1e-4 of the largest in single precision.
    What whole channels of zeros save, :func:`compact` saves on any machine.

    Args:
        model: The masked model, on the device on which it will run; it is not changed.
        example: A tensor, a tuple of ``forward``'s arguments, or a mapping of its keyword arguments, with as
            many rows as the model will be given.
        seconds: Duration of each measurement.

    Raises:
        ValueError: If ``seconds`` is wrong, or processes divide the parameters.
    """
    check_seconds(seconds=seconds)
    check_unsharded(model, "use_sparse_kernels")
    check_materialized(model)
    twin, probe = copy_model(model).eval(), as_probe(example)
    expected = _outputs(twin, probe)
    given = _inputs(twin, probe)
    layers = []
    for name, module in twin.named_modules():
        sparsity = _sparsity(module)
        if sparsity == 0:
            continue
        trial = KernelTrial(name, sparsity, why_not=_why_not(module, name in given))
        if isinstance(module, nn.Linear) and trial.why_not is None:
            trial = _measured(trial, module, given[name], seconds)
            if trial.kernel is not None and trial.why_not is None:
                kernel = _KERNELS[trial.kernel]
                trial = replace(trial, why_not=_converted(twin, module, kernel, probe, expected))
        layers.append(trial)
    before, after = latency([model, twin], example, seconds)
    return SparseKernels(twin, tuple(layers), before, after)


def _sparsity(module: nn.Module) -> float:
    """Return the share of a module's weights that are 0; 0 if it has no matrix of weights."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or weight.layout is not torch.strided or no_number(weight) is not None:
        return 0.0
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def _why_not(module: nn.Module, ran: bool) -> str | None:
    """Return why no kernel can be tried on a module; ``None`` if one can."""
    if type(module) is not nn.Linear:
        return f"PyTorch has no sparse kernel for {type(module).__name__}"
    return None if ran else "does not run on the example"


def _measured(trial: KernelTrial, layer: nn.Linear, given: Tensor, seconds: float) -> KernelTrial:
    """Return a trial with the fastest of the kernels that give the outputs of the layer."""
    expected, failures = [layer(given)], []
    found: list[tuple[float, KernelTrial]] = []
    for name, kernel in _KERNELS.items():
        if not kernel.fits(layer):
            continue
        twin = copy.deepcopy(layer)
        try:
            kernel.convert(twin)
            difference = relative_difference(expected, [twin(given)])
        except Exception as error:  # a kernel that does not take this type, size or device
            failures.append(f"{name} fails: {error}")
            continue
        if difference > _tolerance(given):
            failures.append(f"outputs with {name} differ by {difference:.1e}")
            continue
        before, after = latency([layer, twin], given, seconds)
        done = replace(trial, kernel=name, before=before, after=after, difference=difference)
        found.append((after / before, done))
    if not found:
        return replace(trial, why_not="; ".join(failures))
    ratio, best = min(found, key=lambda each: each[0])
    return best if ratio * _GAIN <= 1 else replace(best, why_not=f"is no faster with {best.kernel}")


def _converted(
    model: nn.Module, layer: nn.Linear, kernel: _Kernel, probe: Probe, expected: Sequence[Tensor]
) -> str | None:
    """Convert a layer of a model, unless the model cannot have it so.

    Returns:
        Why the layer is left as it was; ``None`` if it is converted.
    """
    weight, kind = layer.weight, type(layer)
    kernel.convert(layer)
    try:
        difference = relative_difference(expected, _outputs(model, probe))
        why = f"outputs of the model would differ by {difference:.1e}"
    except Exception as error:  # code that reads the weight itself
        difference, why = math.inf, f"the model would not run: {error}"
    if difference <= max(map(_tolerance, expected)):
        return None
    layer.weight, layer.__class__ = weight, kind
    return why


def _outputs(model: nn.Module, probe: Probe) -> list[Tensor]:
    with evaluation_mode(model):
        return reachable_tensors(probe(model))


def _inputs(model: nn.Module, probe: Probe) -> dict[str, Tensor]:
    """Return the first input of each linear layer, by its name, where it is a tensor."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if len(given) == 1 and torch.is_tensor(given[0]):
            found.setdefault(name, given[0].clone())

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                hooks.callback(module.register_forward_pre_hook(partial(keep, name)).remove)
        _outputs(model, probe)
    return found


def _tolerance(tensor: Tensor) -> float:
    return _TOLERANCE.get(tensor.dtype, _TOLERANCE_HALF)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.3g}"
