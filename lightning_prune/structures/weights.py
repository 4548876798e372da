"""Structures whose units lie within one tensor: single weights, and blocks of weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.core.averages import average_reasons
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_counts
from lightning_prune.core.patterns import Patterns, check_patterns, matches, set_patterns, with_names
from lightning_prune.core.tensors import no_score, shapeless
from lightning_prune.structures.base import Structure
from lightning_prune.structures.matrices import input_dim_of, is_matrix
from lightning_prune.units.budgets import Axis, Budget, Term
from lightning_prune.units.groups import UNKNOWN_INPUTS, UnitGroup, Units
from lightning_prune.units.shards import to_local
from lightning_prune.units.slices import BlockSlice, ElementSlice, Slice

_LAYERS = (nn.Linear, _ConvNd)
_Self = TypeVar("_Self", bound="Weights")
_NEVER = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class _Use(NamedTuple):
    """One of a parameter's names, the module that holds it, and its name there."""

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        return cast(nn.Parameter, getattr(self.module, self.leaf))


class Weights(Structure):
    """Units that lie within one tensor; by default in the weights of matrix products in known modules.

    These modules are Linear, Bilinear, Conv and recurrent ones, ``nn.MultiheadAttention``, and Hugging Face's
    ``Conv1D``. A tied weight belongs to one group, under its first name, if every module that uses it can be
    pruned.

    Attributes:
        include: Glob pattern over parameter and module names, or class of modules, or several of these. With
            it, every matching parameter of two or more dimensions is pruned, even one that does not train, but
            for norms and embeddings.
        exclude: The same, for parameters that are not pruned.
    """

    include: Patterns
    exclude: Patterns

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

    def advised(self, why: str, parameter: nn.Parameter, uses: list[_Use]) -> str:
        """Return why a parameter stays that ``include`` does not name, and would be pruned if it did."""
        return why

    def by_name(self: _Self, model: nn.Module) -> _Self:
        """Return the structure with names of modules in place of their kinds."""
        return with_names(self, model)

    def units(self, model: nn.Module, example: Any = None) -> Units:
        """Return one group for each weight tensor; the example is used only to count multiply-adds."""
        found = self.by_name(model)._found(model, example)
        if not found.groups:
            raise self.nothing_in(model, found.frozen)
        return found

    def _found(self, model: nn.Module, example: Any) -> Units:
        uses = _uses(model)
        names = {name for name, _ in model.named_modules() if name}
        names |= {each.name for places in uses.values() for each in places}
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        groups: list[UnitGroup] = []
        whole: dict[str, str] = {}
        averages = average_reasons(model)
        for name, parameter in model.named_parameters():
            why = self._stays(parameter, uses[name])
            if why is None and isinstance(parameter, UninitializedParameter):
                raise shapeless(name)
            if why is None:
                why = averages.get(name)
            if why is None:
                input_dim = _input_dim(uses[name])
                why = self.refuses(parameter, input_dim)
            if why is None:
                part = self.slice_of(name, parameter, input_dim)
                groups.append(UnitGroup(name, (part,), input_dim=input_dim, named=self._named(uses[name])))
            else:
                whole[name] = why
        frozen = _computed_weights(model) | self._listed(whole, groups, uses)
        return Units(tuple(groups), frozen, _budgets(model, groups, example))

    def leaves_out(self, name: str) -> bool:
        """Return whether ``exclude`` matches the name."""
        return matches(name, self.exclude)

    def _listed(
        self, whole: Mapping[str, str], groups: Sequence[UnitGroup], uses: Mapping[str, list[_Use]]
    ) -> dict[str, str]:
        """Return the reasons that are told: those of matrices, and of what a pattern names that prunes nothing.

        Args:
            whole: Name of each parameter that stays whole, to the reason.
            groups: One for each parameter that is pruned.
            uses: All uses of each parameter.
        """
        pruned = [each.name for group in groups for each in uses[group.name]]
        idle = [
            each
            for each in cast(Sequence[str], self.include or ())
            if not any(matches(name, [each]) for name in pruned)
        ]
        return {
            name: why
            for name, why in whole.items()
            if _is_large(uses[name][0].parameter) or any(matches(each.name, idle) for each in uses[name])
        }

    def _named(self, uses: list[_Use]) -> bool:
        return any(matches(each.name, self.include) for each in uses)

    def _stays(self, parameter: nn.Parameter, uses: list[_Use]) -> str | None:
        """Return why a parameter is not pruned: its name, its size, or a module that uses it; else ``None``."""
        if any(matches(each.name, self.exclude) for each in uses):
            return "exclude names it"
        if self.include is not None and not self._named(uses):
            return "include does not name it"
        if _is_large(parameter) and (why := no_score(to_local(parameter))) is not None:
            return why
        why = self._kept_by_uses(parameter, uses)
        if why is not None or isinstance(parameter, UninitializedParameter):
            return why
        if not _is_large(parameter):
            return "it has one dimension: biases and the like are not pruned"
        return None if parameter.numel() else "it has no elements"

    def _kept_by_uses(self, parameter: nn.Parameter, uses: list[_Use]) -> str | None:
        """Return why a parameter is not pruned where modules use it; ``None`` if nothing speaks against it."""
        never = next((each.module for each in uses if isinstance(each.module, _NEVER)), None)
        if never is not None:
            return f"{type(never).__name__} uses it"
        why = next(filter(None, map(_unknown_use, uses)), None)
        return None if why is None or self.include is not None else self.advised(why, parameter, uses)


@dataclass(frozen=True, repr=False)
class Unstructured(Weights):
    """Single weights: by default those of matrix products in known modules, one group for each weight tensor.

    Known modules are Linear, Bilinear, Conv and recurrent ones, ``nn.MultiheadAttention``, and Hugging Face's
    ``Conv1D``. A tied weight belongs to one group, under its first name, if every module that uses it can be
    pruned. Every other parameter of two or more dimensions is frozen, with the reason.

    Args:
        include: Glob pattern over parameter and module names, or class of modules, or several of these. With
            it, every matching parameter of two or more dimensions is pruned, even one that does not train, but
            for norms and embeddings. A class, or the dotted path of one that is loaded (``"torch.nn.Conv2d"``),
            stands for the names of all its modules, those of subclasses included.
        exclude: The same, for parameters that are not pruned.

    Raises:
        ValueError: If a pattern is neither a string nor a class.
    """

    include: Patterns = None
    exclude: Patterns = None

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
        ValueError: If a size is no whole number of at least 1, or a pattern is neither a string nor a class.
    """

    rows: int
    cols: int
    include: Patterns = None
    exclude: Patterns = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rows=self.rows, cols=self.cols)

    def slice_of(self, name: str, weight: Tensor, input_dim: int | None) -> Slice:
        """Return a slice in which each block is a unit."""
        return BlockSlice(name, weight, *self._block(input_dim))

    def refuses(self, weight: Tensor, input_dim: int | None) -> str | None:
        """Return why a tensor cannot be divided into blocks; ``None`` if it can."""
        if input_dim is None:
            return f"{UNKNOWN_INPUTS}: Unstructured can prune it"
        shape, block = tuple(weight.shape[:2]), self._block(input_dim)
        if all(size % each == 0 for size, each in zip(shape, block, strict=True)):
            return None
        return f"{shape[0]} x {shape[1]} is no multiple of {block[0]} x {block[1]}"

    def _block(self, input_dim: int | None) -> tuple[int, int]:
        """Return the size of a block along the first two dimensions of a weight."""
        return (self.cols, self.rows) if input_dim == 0 else (self.rows, self.cols)

    def advised(self, why: str, parameter: nn.Parameter, uses: list[_Use]) -> str:
        """Return why the parameter cannot be divided into blocks; otherwise the reason that is given."""
        return (self.refuses(parameter, _input_dim(uses)) if _is_large(parameter) else None) or why


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
    """Return all uses of each parameter, by the parameter's first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, list[_Use]] = {name: [] for name in first.values()}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses[first[id(parameter)]].append(_Use(f"{prefix}.{leaf}".lstrip("."), module, leaf))
    return uses


def _is_large(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has two dimensions or more; one without a shape yet has not."""
    return not isinstance(parameter, UninitializedParameter) and parameter.ndim > 1


def _unknown_use(use: _Use) -> str | None:
    """Return why a parameter stays whole where a module uses it, unless ``include`` names it, or ``None``."""
    advice = "name it in include to prune it"
    if isinstance(use.module, ParametrizationList) or _computed(use.module):
        return f"a parametrisation computes a weight from it: {advice} (the computed weight need not be sparse)"
    if not is_matrix(use.module, use.leaf):
        return f"{type(use.module).__name__} uses it in a way that is not known: {advice}, weight by weight"
    return None


def _input_dim(uses: list[_Use]) -> int | None:
    """Return the dimension of a weight that runs over inputs; ``None`` if that is unknown, or there are two."""
    dims = {input_dim_of(each.module, each.leaf) for each in uses}
    return dims.pop() if len(dims) == 1 else None


def _computed_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights of layers that are no parameters and so cannot be masked, name to reason."""
    return {
        f"{name}.weight".lstrip("."): "computed from other parameters (a parametrisation)"
        for name, module in model.named_modules()
        if _computed(module)
    }


def _computed(module: nn.Module) -> bool:
    """Return whether the weight of a layer is computed from other parameters."""
    return isinstance(module, _LAYERS) and module._parameters.get("weight") is None
