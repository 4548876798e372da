"""Weight averages: ``AveragedModel`` and moving copies, and the part of a model that each of them averages."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.core.trained import trains


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


_SIMILAR = 0.5  # cosine similarity; that of independent weights is near 0
# copies that were recognised once: training may lead the weights of a part further away than its copy follows
_KNOWN: WeakSet[nn.Module] = WeakSet()
_APART: WeakSet[nn.Module] = WeakSet()  # copies that follow nothing, as teachers do not


def averaged_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside a model that hold an average of weights, by name in the model.

    These are the averaged module of each ``AveragedModel``, and moving copies, as momentum encoders and mean
    teachers are: no parameter of theirs trains, and another part of the model that trains has parameters of the
    same names and shapes, and similar weights.
    """
    averaged = {
        f"{name}.module": module.module
        for name, module in model.named_modules()
        if name and isinstance(module, AveragedModel)
    }
    return averaged | _moving_copies(model, averaged)


def keep_apart(module: nn.Module) -> None:
    """Note that a module is no moving copy, although it looks like one: it is a teacher, say."""
    _APART.add(module)


def frozen_twins(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the parts of a model that a module within it has the class, names and shapes of; it is frozen."""
    module = model.get_submodule(name)
    if _trains(module) or not (shapes := _shapes(module)):
        return []
    own = set(map(id, module.parameters()))
    return [
        part
        for part in model.modules()
        if type(part) is type(module) and own.isdisjoint(map(id, part.parameters())) and _shapes(part) == shapes
    ]


def is_apart(module: nn.Module) -> bool:
    """Return whether :func:`keep_apart` was called for a module, or for the original of its copy."""
    return module in _APART


def recognise_twin(model: nn.Module, twin: nn.Module) -> None:
    """Note of the modules of a copied model what is known of those of the original."""
    if not _KNOWN and not _APART:
        return
    pairs = list(zip(model.modules(), twin.modules(), strict=False))
    for known in (_KNOWN, _APART):
        known.update([other for one, other in pairs if one in known])


def _moving_copies(model: nn.Module, averaged: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    # what was recognised in a fit stays so when nothing tells any more which parameters train
    copies = {id(each) for module in model.modules() if module in _KNOWN for each in module.parameters()}
    training = {id(each) for each in model.modules() if _trains(each, copies)}
    if not training:
        return {}
    seen = {id(each) for average in averaged.values() for each in average.modules()}
    parts = [each for each in model.modules() if id(each) in training and id(each) not in seen]
    found = {}
    for name, module in model.named_modules():
        frozen = any(each.ndim > 1 for each in module.parameters()) and id(module) not in training
        if module in _APART:
            seen |= {id(each) for each in module.modules()}
        if name and frozen and id(module) not in seen:
            shapes = _shapes(module)
            own = set(map(id, module.parameters()))
            alike = [
                part
                for part in parts
                if _shapes(part) == shapes and own.isdisjoint(map(id, part.parameters()))  # it is not tied
            ]
            if alike and (module in _KNOWN or any(_similar(part, module) for part in alike)):
                found[name] = module
                _KNOWN.add(module)
                seen |= {id(each) for each in module.modules()}
    return found


def _trains(module: nn.Module, copies: Container[int] = ()) -> bool:
    """Return whether a parameter of a module trains that is not among these, given by ``id``."""
    return any(each.requires_grad and trains(each) and id(each) not in copies for each in module.parameters())


@torch.no_grad()
def _similar(part: nn.Module, copy: nn.Module) -> bool:
    """Return whether two modules have similar weights. Those of norms do not count: all are near 1 at first."""

    def matrices(module: nn.Module) -> Tensor:
        return torch.cat([each.flatten().float() for each in module.parameters() if each.ndim > 1])

    return bool(torch.cosine_similarity(matrices(part), matrices(copy), dim=0) > _SIMILAR)


def averages_within(model: nn.Module) -> dict[str, Average]:
    """Return, by name, the averages inside a model that are of this model or of one of its parts."""
    found = {name: average_of(model, module) for name, module in averaged_modules(model).items()}
    return {name: average for name, average in found.items() if average is not None}


def averaged_names(model: nn.Module) -> dict[str, str]:
    """Return the name of each parameter and buffer of an average in a model, to that of what it averages."""
    return names_in(averages_within(model))


def names_in(averages: Mapping[str, Average]) -> dict[str, str]:
    """Return the names of :func:`averaged_names` of averages that are known."""
    found = averages.items()
    return {f"{place}.{own}": name for place, average in found for name, own in average.names.items()}


def average_reasons(model: nn.Module) -> dict[str, str]:
    """Return the name of each parameter of an average in a model, to the reason to keep it."""
    reasons: dict[str, str] = {}
    for place, module in averaged_modules(model).items():
        average = average_of(model, module)
        of = ""
        if average is not None:
            part = next(name for name, own in average.names.items() if not own)
            of = f" of {part or 'the model itself'}"
        if isinstance(model.get_submodule(place.rpartition(".")[0]), AveragedModel):
            why = f"is an average{of}"
        else:
            why = f"looks like a moving average{of}: exclude it if it is none"
        reasons |= {f"{place}.{name}": why for name, _ in module.named_parameters()}
    return reasons


def average_of(model: nn.Module, module: nn.Module) -> Average | None:
    """Return the average that a module holds of a model or of a part of it.

    The averaged part is the submodule of ``model``, or ``model`` itself, whose parameters have the same names
    and shapes as those of ``module``. Modules inside an average are not candidates. If several candidates
    match, only those with a parameter that trains count, and of these those with similar weights.

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
        parts = [part for part in parts if _trains(part)]
    if len(parts) > 1:  # such as two critics, each of which has its own target
        parts = [part for part in parts if _similar(part, module)]
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
