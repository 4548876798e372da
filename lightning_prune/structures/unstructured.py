"""Single weights: each is a unit of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from lightning_prune.budgets import Budget, Line, Term
from lightning_prune.compaction import macs_by_weight
from lightning_prune.probe import as_probe
from lightning_prune.structures.base import Structure
from lightning_prune.structures.patterns import check_are_patterns, check_patterns, matches
from lightning_prune.units import Slice, UnitGroup, Units

_Use: TypeAlias = tuple[str, nn.Module]  # one of a parameter's names, and the module that holds it

_LAYERS = (nn.Linear, _ConvNd)
_NEVER = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, repr=False)
class Unstructured(Structure):
    """Single weights: by default those of Linear and Conv modules, one group a weight tensor.

    A tied weight belongs to one group, under its first name, if every module that uses it is prunable.

    Args:
        include: Glob pattern, or patterns, over parameter and module names. With it, any parameter of two
            or more dimensions that matches is taken, outside norms and embeddings.
        exclude: The same, for what is to stay dense.

    Raises:
        ValueError: If a pattern is no string.
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_are_patterns(include=self.include, exclude=self.exclude)

    def units(self, model: nn.Module, example: Any = None) -> Units:
        """One group a weight tensor."""
        uses = _uses(model)
        names = {name for name, _ in model.named_modules() if name}
        names |= {name for places in uses.values() for name, _ in places}
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        groups, frozen = [], _computed_weights(model)
        for name, parameter in model.named_parameters():
            if not self._wants(parameter, uses[name]):
                continue
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name!r} has no shape yet: run a batch before training starts.")
            outsider = self._outsider(uses[name])
            if outsider is not None:
                frozen[name] = f"{type(outsider).__name__} uses it"
            elif parameter.numel() == 0:
                frozen[name] = "it has no elements"
            else:
                groups.append(UnitGroup(name, (Slice(name, parameter),), input_dim=_input_dim(uses[name])))
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

    def _outsider(self, uses: list[_Use]) -> nn.Module | None:
        """A module that holds the parameter, too, and that pruning is not meant for."""
        for _, module in uses:
            if isinstance(module, _NEVER) or (self.include is None and not isinstance(module, _LAYERS)):
                return module
        return None


def _budgets(model: nn.Module, groups: list[UnitGroup], example: Any) -> dict[str, Budget]:
    """Parameters and, with an example, multiply-adds: of each weight as many as of the others in its tensor."""
    shares = {group.name: (Line(group.size, 0, ((group.name, None),)),) for group in groups}
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, UninitializedParameter)
    }
    budgets = {"params": sizes}
    if example is not None:
        budgets["macs"] = macs_by_weight(model, as_probe(example))
    return {
        budget: Budget([Term(amount, shares.get(name, ())) for name, amount in amounts.items()])
        for budget, amounts in budgets.items()
    }


def _uses(model: nn.Module) -> dict[str, list[_Use]]:
    """First name of each parameter to every place that holds it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, list[_Use]] = {name: [] for name in first.values()}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses[first[id(parameter)]].append((f"{prefix}.{leaf}".lstrip("."), module))
    return uses


def _input_dim(uses: list[_Use]) -> int | None:
    """The dimension of a weight that runs over inputs; a grouped transposed convolution has none."""
    transposed = [module for _, module in uses if isinstance(module, _ConvTransposeNd)]
    if any(module.groups > 1 for module in transposed):
        return None
    return 0 if transposed else 1


def _computed_weights(model: nn.Module) -> dict[str, str]:
    """Layers whose weight is no parameter: a mask would have nothing to hold on to."""
    return {
        f"{name}.weight".lstrip("."): "computed from other parameters (a parametrisation)"
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and module._parameters.get("weight") is None
    }
