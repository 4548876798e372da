"""Weight averages, as in ``AveragedModel``, and the part of a model that each of them averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import AveragedModel


@dataclass(frozen=True)
class Average:
    """A weight average of a model or of a part of it.

    If the masked weights are 0 in both the model and the average, updates keep them at 0 in the average.

    Args:
        module: The module that holds the averaged weights.
        names: Maps the name in the model of each module, parameter and buffer of the averaged part to its name
            in ``module``.
    """

    module: nn.Module
    names: Mapping[str, str]


def averaged_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the averaged module of each ``AveragedModel`` inside a model, by its name in the model."""
    return {
        f"{name}.module": module.module
        for name, module in model.named_modules()
        if name and isinstance(module, AveragedModel)
    }


def averages_within(model: nn.Module) -> dict[str, Average]:
    """Return, by name, the averages inside a model that are of this model or of one of its parts."""
    found = {name: average_of(model, module) for name, module in averaged_modules(model).items()}
    return {name: average for name, average in found.items() if average is not None}


def average_of(model: nn.Module, module: nn.Module) -> Average | None:
    """Return the average that a module holds of a model or of a part of it.

    The averaged part is the submodule of ``model``, or ``model`` itself, whose parameters have the same names
    and shapes as those of ``module``. Modules inside an ``AveragedModel`` are not candidates. If several
    candidates match, only those with a parameter that requires a gradient count.

    Args:
        model: The model.
        module: The module that holds averaged weights.

    Returns:
        The average; ``None`` if no candidate matches, or more than one does.
    """
    shapes = _shapes(module)
    inner = {id(each) for average in averaged_modules(model).values() for each in average.modules()}
    parts = [part for part in model.modules() if id(part) not in inner and _shapes(part) == shapes]
    if len(parts) > 1:  # such as a frozen teacher of the same architecture
        parts = [part for part in parts if any(each.requires_grad for each in part.parameters())]
    return Average(module, _names(model, parts[0])) if shapes and len(parts) == 1 else None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in module.named_parameters()}


def _names(model: nn.Module, part: nn.Module) -> dict[str, str]:
    """Map the name in a model of each module, parameter and buffer of one of its parts to its name in the part.

    Entries are matched by identity, because the part may be registered in the model under several names.
    """

    def held(module: nn.Module) -> list[tuple[str, object]]:
        return [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]

    known = {id(each): name for name, each in held(model)}
    return {known[id(each)]: name for name, each in held(part)}
