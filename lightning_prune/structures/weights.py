"""Structures whose units lie within one tensor: single weights, and blocks of weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.core.averages import averaged_modules
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_counts
from lightning_prune.structures.base import Structure
from lightning_prune.structures.patterns import check_patterns, matches, set_patterns
from lightning_prune.units.budgets import Axis, Budget, Term
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import BlockSlice, ElementSlice, Slice

_Use: TypeAlias = tuple[str, nn.Module]  # one of a parameter's names, and the module that holds it

_LAYERS = (nn.Linear, _ConvNd)
_NEVER = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Weights(Structure):
    """Units that lie within one tensor; by default in the weights of Linear and Conv modules.

    A tied weight belongs to one group, under its first name, if every module that uses it can be pruned.

    Attributes:
        include: Glob pattern, or patterns, over parameter and module names. With it, every matching parameter
            of two or more dimensions is pruned, except those of norms and embeddings.
        exclude: The same, for parameters that are not pruned.
    """

    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None

    def __post_init__(self) -> None:
        set_patterns(self, "include", "exclude")

    @abstractmethod
    def slice_of(self, name: str, weight: Tensor, input_dim: int | None) -> Slice:
        """Return the slice that divides a tensor into units.

        Args:
            name: Name of the tensor.
            weight: The tensor.
            input_dim: The dimension that runs over a layer's inputs; ``None`` if there is none.
        """

    def refuses(self, weight: Tensor, input_dim: int | None) -> str | None:
        """Return why a tensor cannot be divided into such units; ``None`` if it can."""
        return None

    def units(self, model: nn.Module, example: Any = None) -> Units:
        """Return one group for each weight tensor; the example is used only to count multiply-adds."""
        uses = _uses(model)
        names = {name for name, _ in model.named_modules() if name}
        names |= {name for places in uses.values() for name, _ in places}
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        groups, frozen = [], _computed_weights(model)
        averages = tuple(averaged_modules(model))
        for name, parameter in model.named_parameters():
            if not self._wants(parameter, uses[name]):
                continue
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet: run a batch before training starts.")
            input_dim = _input_dim(uses[name])
            average = "it is an average" if matches(name, averages) else None
            why = average or self._stays(parameter, uses[name]) or self.refuses(parameter, input_dim)
            if why is not None:
                frozen[name] = why
            else:
                part = self.slice_of(name, parameter, input_dim)
                groups.append(UnitGroup(name, (part,), input_dim=input_dim))
        if not groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in frozen.items())
            raise ValueError(f"{self!r} finds nothing to prune in {type(model).__name__}. {reasons}".rstrip())
        return Units(tuple(groups), frozen, _budgets(model, groups, example))

    def _wants(self, parameter: nn.Parameter, uses: list[_Use]) -> bool:
        if any(matches(name, self.exclude) for name, _ in uses):
            return False
        if self.include is None:
            return any(name.endswith("weight") and isinstance(module, _LAYERS) for name, module in uses)
        wanted = any(matches(name, self.include) for name, _ in uses)
        return wanted and (isinstance(parameter, UninitializedParameter) or parameter.ndim > 1)

    def _stays(self, parameter: nn.Parameter, uses: list[_Use]) -> str | None:
        """Return why a parameter may not be pruned: its size, or a module that uses it; ``None`` if it may."""
        for _, module in uses:
            if isinstance(module, _NEVER) or (self.include is None and not isinstance(module, _LAYERS)):
                return f"{type(module).__name__} uses it"
        return None if parameter.numel() else "it has no elements"


@dataclass(frozen=True, repr=False)
class Unstructured(Weights):
    """Single weights: by default those of Linear and Conv modules, one group for each weight tensor.

    A tied weight belongs to one group, under its first name, if every module that uses it can be pruned.

    Args:
        include: Glob pattern, or patterns, over parameter and module names. With it, every matching parameter
            of two or more dimensions is pruned, except those of norms and embeddings.
        exclude: The same, for parameters that are not pruned.

    Raises:
        ValueError: If a pattern is no string.
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def slice_of(self, name: str, weight: Tensor, input_dim: int | None) -> Slice:
        """Return a slice in which each element is a unit."""
        return ElementSlice(name, weight)


@dataclass(frozen=True, repr=False)
class Blocks(Weights):
    """Blocks of ``rows`` outputs x ``cols`` inputs of each weight, as block-sparse matrix kernels need them.

    A block of a convolution includes all positions of its kernels. Weights whose shape is no multiple of the
    block are frozen, with the reason. Gray et al. 2017, "GPU Kernels for Block-Sparse Weights".

    Args:
        rows: Number of outputs in a block, at least 1.
        cols: Number of inputs in a block, at least 1.
        include: As for :class:`Unstructured`.
        exclude: As for :class:`Unstructured`.

    Raises:
        ValueError: If a size is no whole number of at least 1, or a pattern is no string.
    """

    rows: int
    cols: int
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rows=self.rows, cols=self.cols)

    def slice_of(self, name: str, weight: Tensor, input_dim: int | None) -> Slice:
        """Return a slice in which each block is a unit."""
        return BlockSlice(name, weight, *self._block(input_dim))

    def refuses(self, weight: Tensor, input_dim: int | None) -> str | None:
        """Return why a tensor cannot be divided into blocks; ``None`` if it can."""
        if input_dim is None:
            return f"{self!r} needs inputs"
        shape, block = tuple(weight.shape[:2]), self._block(input_dim)
        if all(size % each == 0 for size, each in zip(shape, block, strict=True)):
            return None
        return f"{shape[0]} x {shape[1]} is no multiple of {block[0]} x {block[1]}"

    def _block(self, input_dim: int | None) -> tuple[int, int]:
        """Return the size of a block along the first two dimensions of a weight."""
        return (self.cols, self.rows) if input_dim == 0 else (self.rows, self.cols)


def _budgets(model: nn.Module, groups: list[UnitGroup], example: Any) -> dict[str, Budget]:
    """Return the budgets of parameters and, with an example, of multiply-adds, by name.

    Multiply-adds of a tensor are divided equally among its weights.
    """
    shares = {group.name: (Axis(group.size, 0, ((group.name, None),)),) for group in groups}
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, UninitializedParameter)
    }
    budgets = {"params": sizes}
    if example is not None:
        budgets["macs"] = macs_by_parameter(copy_model(model), example)
    return {
        budget: Budget([Term(amount, shares.get(name, ())) for name, amount in amounts.items()])
        for budget, amounts in budgets.items()
    }


def _uses(model: nn.Module) -> dict[str, list[_Use]]:
    """Return every name and module that holds each parameter, by the parameter's first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, list[_Use]] = {name: [] for name in first.values()}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses[first[id(parameter)]].append((f"{prefix}.{leaf}".lstrip("."), module))
    return uses


def _input_dim(uses: list[_Use]) -> int | None:
    """Return the dimension of a weight that runs over inputs; ``None`` for a grouped transposed convolution."""
    transposed = [module for _, module in uses if isinstance(module, _ConvTransposeNd)]
    if any(module.groups > 1 for module in transposed):
        return None
    return 0 if transposed else 1


def _computed_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights of layers that are no parameters and so cannot be masked, name to reason."""
    return {
        f"{name}.weight".lstrip("."): "computed from other parameters (a parametrisation)"
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and module._parameters.get("weight") is None
    }
