"""Averages of a network, or of parts of it, as torch's ``AveragedModel`` holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import AveragedModel


@dataclass(frozen=True)
class Average:
    """An average of a part of a network: where masked weights are 0 in both, they stay 0 in the average.

    Args:
        module: Holds the averaged weights.
        names: Name in the network of each module, parameter and buffer of the part to its name in ``module``.
    """

    module: nn.Module
    names: Mapping[str, str]


def averaged_names(model: nn.Module) -> dict[str, nn.Module]:
    """The averages that are part of a model, by the names that they have in it."""
    return {
        f"{name}.module": module.module
        for name, module in model.named_modules()
        if name and isinstance(module, AveragedModel)
    }


def averages_within(model: nn.Module) -> dict[str, Average]:
    """Those of them that average the rest of the model or one of its parts, by name."""
    found = {name: average_of(model, module) for name, module in averaged_names(model).items()}
    return {name: average for name, average in found.items() if average is not None}


def average_of(model: nn.Module, module: nn.Module) -> Average | None:
    """What a module averages: the part of a network whose parameters have the same names and shapes.

    ``None`` if there is no such part, or there are several that train.
    """
    shapes = _shapes([module])[0]
    inner = {id(each) for average in averaged_names(model).values() for each in average.modules()}
    outer = [each for each in model.modules() if id(each) not in inner]
    parts = [part for part, found in zip(outer, _shapes(outer), strict=True) if found == shapes]
    if len(parts) > 1:  # such as a teacher's
        parts = [part for part in parts if any(each.requires_grad for each in part.parameters())]
    return Average(module, _names(model, parts[0])) if shapes and len(parts) == 1 else None


def _shapes(modules: Iterable[nn.Module]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(each.shape) for name, each in module.named_parameters()} for module in modules]


def _names(model: nn.Module, part: nn.Module) -> dict[str, str]:
    """What a network calls what a part of it, which may lie in several places, holds under its own names."""

    def held(module: nn.Module) -> list[tuple[str, object]]:
        return [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]

    known = {id(each): name for name, each in held(model)}
    return {known[id(each)]: name for name, each in held(part)}
