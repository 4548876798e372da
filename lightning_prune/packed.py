"""Packed files: what masks have left of a network, at one bit a masked weight and the values that are kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.compaction import Plan, replay_
from lightning_prune.cost import packing_saves
from lightning_prune.files import read, replacing
from lightning_prune.loading import shapes_after
from lightning_prune.masks import masked_parameters, pack, unpack
from lightning_prune.shards import check_whole

_Module = TypeVar("_Module", bound=nn.Module)
_FORMAT = "lightning_prune packed 1"


@torch.no_grad()
def save_packed(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    plans: Iterable[Plan] = (),
) -> int:
    """Saves a masked network in few bytes; it runs no faster for it.

    A masked parameter becomes one bit a weight and the values that are kept, where that is less; all
    else in ``state_dict`` is saved as it is. What is tied is saved once.

    Args:
        model: Masked: what masks remove is 0.
        masks: Parameter name to bool mask, True where kept.
        path: The file to write; its folder is made if it is missing.
        plans: How the network was compacted, if it is to be loaded into a dense one; ``lightning-prune export``
            finds them in the checkpoint.

    Returns:
        Bytes written.

    Raises:
        ValueError: If a mask fits no parameter, or removes weights that are not 0, or ``state_dict`` holds
            what cannot be loaded safely. Nothing is written then.
    """
    check_whole(model, "save_packed")
    masked = {}
    for name, parameter in masked_parameters(model, masks).items():
        mask = masks[name].to(parameter.device)
        if parameter[~mask].count_nonzero():
            raise ValueError(
                f"masks[{name!r}] removes weights that are not 0: apply the masks to the model first."
            )
        if packing_saves(parameter, int(mask.count_nonzero())) > 0:
            masked[id(parameter)] = _entry(parameter, mask)
    # the very parameters, so that a tied one is known under each of its names
    values = model.state_dict(keep_vars=True)
    # copies, since a tensor that is part of a larger one would take that along
    dense = {
        id(value): value.detach().clone() if torch.is_tensor(value) else value
        for value in values.values()
        if id(value) not in masked
    }
    content = {
        "format": _FORMAT,
        "plans": [plan.to_state() for plan in plans],
        "masked": {name: masked[id(value)] for name, value in values.items() if id(value) in masked},
        "dense": {name: dense[id(value)] for name, value in values.items() if id(value) in dense},
    }
    with replacing(path) as place:
        torch.save(content, place)
        try:
            read(place, "path")
        except ValueError as error:
            raise ValueError(
                f"{type(model).__name__}.state_dict() holds what cannot be read back: {error}"
            ) from error
        return place.stat().st_size


def load_packed(path: str | PathLike[str], model: _Module) -> _Module:
    """Gives a packed network back, bit for bit; what masks have removed is 0, without a sign.

    Args:
        path: What :func:`save_packed` wrote.
        model: Of the same architecture, and in the same types of numbers. Where the file holds a plan, as
            ``lightning-prune export`` writes it for a compacted network, freshly made and dense will do.

    Returns:
        The model given, filled.

    Raises:
        ValueError: If the file is damaged, or does not belong to the model, which stays as it was.
    """
    shown = f"path={os.fspath(path)!r}"
    content = read(path, "path", sums=True)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{shown} was not written by save_packed, or by a later version of it.")
    weights = {**content["dense"], **{name: _restored(entry) for name, entry in content["masked"].items()}}
    plans = [Plan.from_state(plan) for plan in content["plans"]]
    if _misfit(model, weights, ()) is None:
        plans = []  # compacted already
    fault = _misfit(model, weights, plans)
    if fault is not None:
        raise ValueError(f"{shown} does not belong to this {type(model).__name__}: {fault}.")
    for plan in plans:
        replay_(model, plan)
    model.load_state_dict(weights)
    return model


def _entry(parameter: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"bits": pack(mask), "values": parameter.detach()[mask], "shape": list(mask.shape)}


def _restored(entry: Mapping[str, Any]) -> Tensor:
    values: Tensor = entry["values"]
    mask = unpack(entry["bits"], tuple(entry["shape"]))
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def _misfit(model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan]) -> str | None:
    """What the file and the model do not have in common, once plans are replayed on it."""
    own = model.state_dict()
    if own.keys() != weights.keys():
        return f"only one of them has {sorted(own.keys() ^ weights.keys())}"
    for name, shape in shapes_after(model, plans).items():
        saved = weights[name]
        if tuple(saved.shape) != shape:
            return f"{name!r} has shape {tuple(saved.shape)} in the file, {shape} in the model"
        if saved.dtype != own[name].dtype:
            return f"{name!r} is {saved.dtype} in the file, {own[name].dtype} in the model: convert the model"
    return None
