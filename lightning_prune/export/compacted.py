"""Loading of checkpoints of compacted models: the saved compaction plan is replayed before weights load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.plan import PLAN, Plan, shapes_after
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.core import schema
from lightning_prune.core.files import read_file
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.same_kind import same_kind_as
from lightning_prune.core.tensors import check_materialized
from lightning_prune.units.masks import MASKS, unpack
from lightning_prune.units.shards import LOAD_FIRST, check_unsharded

PRUNING_STATE = "the checkpoint's pruning state"
_CALLBACKS = schema.record(
    {"callbacks": schema.mapping(schema.anything)}, before={"callbacks": {}}, others=True
)
_WEIGHTS = schema.record({"state_dict": schema.mapping(schema.anything)}, others=True)
# only the entries that give shapes and masks: the callback checks the others
_STATE = schema.record(
    {"pruner": schema.record({"masks": MASKS, "plan": schema.optional(PLAN)}, others=True)}, others=True
)
_Module = TypeVar("_Module", bound=nn.Module)


def load_compact(checkpoint: str | PathLike[str] | Mapping[str, Any], model: _Module) -> _Module:
    """Load the checkpoint of a compacted model into a dense model of the same class.

    Args:
        checkpoint: A checkpoint that ``trainer.save_checkpoint`` wrote after a fit with
            ``PruningCallback(compact=True)``, or at any time with ``compact="each"``: the path of the file,
            which is read with ``weights_only=True``, or its content as returned by ``torch.load``.
        model: A newly created model with its dense shapes.

    Returns:
        The same model, compacted in place and with the weights of the checkpoint. If the checkpoint is of a
        model that was not compacted, only the weights are loaded.

    Raises:
        ValueError: If the file cannot be read, the checkpoint does not fit the model, or processes divide the
            model's parameters; the model is then unchanged.
    """
    check_unsharded(model, "load_compact", LOAD_FIRST)
    check_materialized(model)
    if not isinstance(checkpoint, Mapping):
        checkpoint = read_file(checkpoint, "checkpoint")
    weights = weights_in(checkpoint)
    plans = plans_in(checkpoint)
    check_shapes(model, weights, plans)
    load_weights_(model, weights, plans)
    return model


def load_weights_(model: nn.Module, weights: Mapping[str, Any], plans: Sequence[Plan]) -> None:
    """Replay compaction plans on a model, and load weights of the resulting shapes into it.

    Raises:
        ValueError: If plans or weights do not fit the model; the model is then unchanged.
    """
    check_weights(model, weights, plans)
    for plan in plans:
        replay_(model, plan)
    model.load_state_dict(weights)


def check_weights(
    model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan], strict: bool = True
) -> None:
    """Check that plans and weights fit a model, by applying them to a copy of it.

    The copy shares the memory of the parameters, unless the class overrides ``load_state_dict``.

    Args:
        model: The model; it is not changed.
        weights: The ``state_dict`` to load after the plans.
        plans: Compaction plans, in order.
        strict: As for ``load_state_dict``.

    Raises:
        ValueError: If they do not fit.
    """
    own = type(model).load_state_dict is not nn.Module.load_state_dict  # may not take assign=
    twin = copy_model(model) if own else copy_sharing_weights(model)
    for plan in plans:
        replay_(twin, plan)
    resized = _loaded_by_own_code(twin)
    expected = {
        name: weights.get(name, each) if name in resized else each for name, each in twin.state_dict().items()
    }
    schema.read(weights, same_kind_as(expected), "the weights")
    try:
        twin.load_state_dict(weights, strict, **({} if own else {"assign": True}))
    except Exception as error:  # modules may override their loading
        raise ValueError(f"the weights do not belong to this {type(model).__name__}: {error}") from error


def weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``state_dict`` in a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    schema.read(checkpoint, _WEIGHTS, "checkpoint")
    weights: dict[str, Any] = checkpoint["state_dict"]  # not a copy, which would lack its _metadata attribute
    return weights


def callback_state_in(checkpoint: Mapping[str, Any], state_key: str) -> Any:
    """Return the state of the callback with this key in a checkpoint; ``None`` if it is missing or empty.

    Raises:
        ValueError: If the checkpoint, or its mapping of callback states, is malformed.
    """
    found = schema.read(checkpoint, _CALLBACKS, "checkpoint")["callbacks"].get(state_key)
    return None if isinstance(found, Mapping) and not found else found


def plan_in(checkpoint: Mapping[str, Any], state_key: str) -> Plan | None:
    """Return the compaction plan in the state of the callback with this key; ``None`` if it did not compact.

    Raises:
        ValueError: If the callback's state is malformed.
    """
    state = callback_state_in(checkpoint, state_key)
    return None if state is None else _pruned(state)["plan"]


def plans_in(checkpoint: Mapping[str, Any]) -> list[Plan]:
    """Return the compaction plans of all pruning callbacks in a checkpoint, in the order of the callbacks."""
    found = (plan_in(checkpoint, key) for key in state_keys_in(checkpoint))
    return [plan for plan in found if plan is not None]


def masks_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the combined masks of all pruning callbacks in a checkpoint: True where all keep a weight.

    Returns:
        Parameter name to bool mask.

    Raises:
        ValueError: If a saved mask is malformed.
    """
    masks: dict[str, Tensor] = {}
    for key in state_keys_in(checkpoint):
        for name, entry in _pruned(callback_state_in(checkpoint, key))["masks"].items():
            mask = unpack(entry["bits"], entry["shape"])
            masks[name] = mask & masks.get(name, mask)
    return masks


def state_keys_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the state keys of the pruning callbacks with a state in a checkpoint, in their order."""
    callbacks = schema.read(checkpoint, _CALLBACKS, "checkpoint")["callbacks"]
    ours = (key for key in callbacks if key.startswith("PruningCallback"))
    return [key for key in ours if callback_state_in(checkpoint, key) is not None]


def _pruned(state: object) -> dict[str, Any]:
    found: dict[str, Any] = schema.read(state, _STATE, PRUNING_STATE)["pruner"]
    return found


def check_shapes(model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan]) -> None:
    """Check that the tensors of a model have the shapes in a checkpoint after plans are replayed on the model.

    Args:
        model: The model; it is not changed.
        weights: The ``state_dict`` in the checkpoint. Tensors that only one of the two has are not checked.
        plans: Compaction plans, in order.

    Raises:
        ValueError: If a shape differs; the message explains how to load a compacted model.
    """
    _check_plain(model, weights)
    shapes = shapes_after(model, plans)
    resized = _loaded_by_own_code(model)
    # by identity, because a tied parameter has several names, of which a plan uses one
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in resized:
            continue
        saved, shape = weights.get(name), shapes.get(id(tensor))
        if torch.is_tensor(saved) and shape is not None and saved.shape != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {tuple(shape)} in this model."
                " A compacted network is loaded with load_compact(checkpoint, model), or by a Trainer that has"
                " its PruningCallback, into a model as it was made, from a checkpoint that was saved with the"
                " callback in the Trainer, and not with weights_only: what was cut is in the callback's state."
            )


def _loaded_by_own_code(model: nn.Module) -> set[str]:
    """Return the names of the tensors of modules that load them by code of their own, which may resize them."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if not type(module)._load_from_state_dict.__module__.startswith("torch.")
        or module._load_state_dict_pre_hooks
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def _check_plain(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint holds masks beside the weights, as ``torch.nn.utils.prune`` does."""
    own = model.state_dict(keep_vars=True)
    for name in weights:
        weight = name.removesuffix("_orig")
        if weight != name and name not in own and f"{weight}_mask" in weights:
            raise ValueError(
                f"the checkpoint holds {name!r} and '{weight}_mask' in place of {weight!r}, as ModelPruning and"
                " torch.nn.utils.prune keep them. Save it again after torch.nn.utils.prune.remove on each;"
                " PruningCallback(keep_zeros=True) then goes on from its zeros."
            )
