"""Packed files of masked models: one bit per weight of a masked parameter, and its kept values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.plan import PLAN, Plan, shapes_after
from lightning_prune.core import schema
from lightning_prune.core.files import atomic_write, read_file
from lightning_prune.core.tensors import check_materialized
from lightning_prune.export.compacted import load_weights_
from lightning_prune.export.safetensors_file import read_safetensors, write_safetensors
from lightning_prune.report.cost import packing_savings
from lightning_prune.units.masks import BITS, Masks, joined_masks, pack, unpack
from lightning_prune.units.shards import LOAD_FIRST, check_unsharded

_Module = TypeVar("_Module", bound=nn.Module)
_Write: TypeAlias = Callable[[Mapping[str, Any], Path, str], None]
_Read: TypeAlias = Callable[[str | PathLike[str], str], Mapping[str, Any]]
_FORMAT = "lightning_prune packed 1"
_MASKED = schema.record(
    {"bits": BITS, "values": schema.dense_tensor(), "shape": schema.sequence(schema.integer())}
)
_CONTENT = schema.record(
    {
        "format": schema.string,
        "plans": schema.sequence(PLAN),
        "masked": schema.mapping(_MASKED),
        "dense": schema.mapping(schema.anything),
    }
)


@torch.no_grad()
def save_packed(
    model: nn.Module,
    masks: Masks,
    path: str | PathLike[str],
    *,
    plans: Iterable[Plan] = (),
) -> int:
    """Save a masked model to a small file. The loaded model is dense again, and runs no faster.

    A masked parameter is stored as one bit per weight and its kept values, if that is less than all its values.
    All other entries of ``state_dict`` are saved as they are, and tied parameters once.

    Args:
        model: The model; its masked weights must be 0.
        masks: Parameter name to bool mask, True where kept; or a list of several such mappings.
        path: The file to write; missing parent folders are created. If its name ends in ``.safetensors``, it is
            in that format, in which other readers find what is not masked by the names in ``state_dict``.
        plans: The plans with which a compacted model was compacted, so that the file can be loaded into a dense
            model. ``lightning-prune export`` takes them from the checkpoint.

    Returns:
        Number of bytes written.

    Raises:
        ImportError: If safetensors is not installed, for a file of that format.
        ValueError: If a mask fits no parameter or removes weights that are not 0, or ``state_dict`` holds
            values that cannot be loaded with ``weights_only=True``; nothing is then written.
    """
    check_unsharded(model, "save_packed")
    check_materialized(model)
    masked, parameters = {}, dict(model.named_parameters())
    for name, given in joined_masks(model, masks).items():
        parameter = parameters[name]
        mask = given.to(parameter.device)
        if parameter[~mask].count_nonzero():
            raise ValueError(
                f"masks[{name!r}] removes weights that are not 0: set them to 0 first, by pruner.apply_() or by"
                " parameter.data.mul_(mask) for each mask."
            )
        if packing_savings(parameter, int(mask.count_nonzero())) > 0:
            masked[id(parameter)] = _entry(parameter, mask)
    # keep_vars keeps the identity of parameters, by which tied ones are recognized
    values = model.state_dict(keep_vars=True)
    # clones, because torch.save would write the whole storage of a view
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
    write, _ = _format(path)
    with atomic_write(path) as place:
        write(content, place, type(model).__name__)
        return place.stat().st_size


def load_packed(path: str | PathLike[str], model: _Module) -> _Module:
    """Load a packed file into a model; kept weights are restored bit for bit, masked weights are +0.

    Args:
        path: A file that :func:`save_packed` wrote.
        model: A model of the same architecture and dtypes. If the file holds compaction plans, as those that
            ``lightning-prune export`` writes for compacted models do, it may also be a newly created dense one.

    Returns:
        The same model, with the weights of the file.

    Raises:
        ImportError: If safetensors is not installed, for a file of that format.
        ValueError: If the file is damaged or does not fit the model, or processes divide the model's
            parameters; the model is then unchanged.
    """
    check_unsharded(model, "load_packed", LOAD_FIRST)
    check_materialized(model)
    place = f"path={os.fspath(path)!r}"
    _, read = _format(path)
    found = read(path, "path")
    if found.get("format") != _FORMAT:
        raise ValueError(
            f"{place} was written by something else than save_packed, or by a later version of it."
        )
    content = schema.read(found, _CONTENT, place)
    masked = {name: _restored(entry, f"{place}: {name!r}") for name, entry in content["masked"].items()}
    weights = {**content["dense"], **masked}
    compacted = _mismatch(model, weights, ()) is None
    plans = () if compacted else content["plans"]
    fault = _mismatch(model, weights, plans)
    if fault is not None:
        raise ValueError(f"{place} does not belong to this {type(model).__name__}: {fault}.")
    load_weights_(model, weights, plans)
    return model


def _write(content: Mapping[str, Any], path: Path, who: str) -> None:
    """Write the content of a packed file with ``torch.save``, and check that it can be loaded."""
    torch.save(content, path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything
        raise ValueError(
            f"{who}.state_dict() holds what cannot be read back with weights_only=True: return plain values"
            " from get_extra_state, or name the classes that are in it in"
            " torch.serialization.add_safe_globals([...]), here and where the file is loaded. torch says:"
            f" {error}"
        ) from error


_FORMATS: dict[str, tuple[_Write, _Read]] = {".safetensors": (write_safetensors, read_safetensors)}


def _format(path: str | PathLike[str]) -> tuple[_Write, _Read]:
    """Return how files of this name are written and read."""
    return _FORMATS.get(Path(path).suffix.lower(), (_write, partial(read_file, sums=True)))


def _entry(parameter: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"bits": pack(mask), "values": parameter.detach()[mask], "shape": list(mask.shape)}


def _restored(entry: Mapping[str, Any], what: str) -> Tensor:
    values: Tensor = entry["values"]
    mask = unpack(entry["bits"], entry["shape"])
    kept = int(mask.count_nonzero())
    if values.shape != (kept,):
        raise ValueError(
            f"{what} has {values.numel()} values of shape {tuple(values.shape)} for the {kept} places that its"
            " mask keeps."
        )
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def _mismatch(model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan]) -> str | None:
    """Return how weights and a model differ after plans are replayed on the model; ``None`` if they fit."""
    own, shapes = model.state_dict(keep_vars=True), shapes_after(model, plans)
    if own.keys() != weights.keys():
        return f"only one of them has {sorted(own.keys() ^ weights.keys())}"
    for name, present in own.items():
        saved, shape = weights[name], shapes.get(id(present))
        if shape is None:
            continue  # extra state of a module, not a tensor
        if not torch.is_tensor(saved):
            return f"{name!r} is {schema.summary(saved)} in the file"
        if saved.shape != shape:
            return f"{name!r} has shape {tuple(saved.shape)} in the file, {tuple(shape)} in the model"
        if saved.dtype != present.dtype:
            return f"{name!r} is {saved.dtype} in the file, {present.dtype} in the model: convert the model"
    return None
