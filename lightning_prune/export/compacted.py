"""Compacted networks out of checkpoints: the plan that travels in them is replayed before weights load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction import PLAN, Plan, replay_, shapes_after
from lightning_prune.core import schema
from lightning_prune.core.files import read_file
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.same_kind import same_kind_as
from lightning_prune.units.masks import MASKS, unpack

PRUNING_STATE = "the checkpoint's pruning state"
_CALLBACKS = schema.record(
    {"callbacks": schema.mapping(schema.anything)}, before={"callbacks": {}}, others=True
)
_WEIGHTS = schema.record({"state_dict": schema.mapping(schema.anything)}, others=True)
# what tells shapes and masks; the callback reads the rest
_STATE = schema.record(
    {"pruner": schema.record({"masks": MASKS, "plan": schema.optional(PLAN)}, others=True)}, others=True
)
_Module = TypeVar("_Module", bound=nn.Module)


def load_compact(checkpoint: str | PathLike[str] | Mapping[str, Any], model: _Module) -> _Module:
    """Gives a compacted network back.

    Args:
        checkpoint: What ``trainer.save_checkpoint`` wrote after a fit with ``PruningCallback(compact=True)``: a
            file, read with ``weights_only=True``, or what ``torch.load`` made of it.
        model: Freshly made, dense.

    Returns:
        The model given, shrunk and filled. A checkpoint of a network that is not compacted fills it as it is.

    Raises:
        ValueError: If the file cannot be read, or the checkpoint does not belong to the model, which stays
            as it was.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = read_file(checkpoint, "checkpoint")
    weights = weights_in(checkpoint)
    plans = plans_in(checkpoint)
    check_shapes(model, weights, plans)
    load_weights_(model, weights, plans)
    return model


def load_weights_(model: nn.Module, weights: Mapping[str, Any], plans: Sequence[Plan]) -> None:
    """Replays plans on a model and loads what belongs to it then.

    Raises:
        ValueError: If that fails; nothing has changed then.
    """
    check_weights(model, weights, plans)
    for plan in plans:
        replay_(model, plan)
    model.load_state_dict(weights)


def check_weights(
    model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan], strict: bool = True
) -> None:
    """Tries plans and weights on a copy of a model, which takes no memory for parameters as a rule.

    Raises:
        ValueError: If they do not belong to it.
    """
    own = type(model).load_state_dict is not nn.Module.load_state_dict  # which may not know of assign
    twin = copy_model(model) if own else copy_sharing_weights(model)
    for plan in plans:
        replay_(twin, plan)
    schema.read(weights, same_kind_as(twin.state_dict()), "the weights")
    try:
        twin.load_state_dict(weights, strict, **({} if own else {"assign": True}))
    except Exception as error:  # modules may load what is theirs in ways of their own
        raise ValueError(f"the weights do not belong to this {type(model).__name__}: {error}") from error


def weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` in a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    schema.read(checkpoint, _WEIGHTS, "checkpoint")
    found: dict[str, Any] = checkpoint["state_dict"]  # itself: modules look at its _metadata
    return found


def callback_state_in(checkpoint: Mapping[str, Any], state_key: str) -> Any:
    """What the callback of this key has left in a checkpoint; ``None`` if there is nothing.

    Raises:
        ValueError: If the checkpoint is none.
    """
    found = schema.read(checkpoint, _CALLBACKS, "checkpoint")["callbacks"].get(state_key)
    return None if isinstance(found, Mapping) and not found else found


def plan_in(checkpoint: Mapping[str, Any], state_key: str) -> Plan | None:
    """The plan that the callback of this key has left in a checkpoint, if it compacted the network.

    Raises:
        ValueError: If its state is none.
    """
    state = callback_state_in(checkpoint, state_key)
    return None if state is None else _pruned(state)["plan"]


def plans_in(checkpoint: Mapping[str, Any]) -> list[Plan]:
    """The plans of all callbacks, in their order."""
    found = (plan_in(checkpoint, key) for key in state_keys_in(checkpoint))
    return [plan for plan in found if plan is not None]


def masks_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameter name to bool mask, True where kept: what the masks of all callbacks leave.

    Raises:
        ValueError: If a mask is none.
    """
    masks: dict[str, Tensor] = {}
    for key in state_keys_in(checkpoint):
        for name, entry in _pruned(callback_state_in(checkpoint, key))["masks"].items():
            mask = unpack(entry["bits"], entry["shape"])
            masks[name] = mask & masks.get(name, mask)
    return masks


def state_keys_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """State keys of the callbacks that have left something in a checkpoint, in their order."""
    callbacks = schema.read(checkpoint, _CALLBACKS, "checkpoint")["callbacks"]
    ours = (key for key in callbacks if key.startswith("PruningCallback"))
    return [key for key in ours if callback_state_in(checkpoint, key) is not None]


def _pruned(state: object) -> dict[str, Any]:
    found: dict[str, Any] = schema.read(state, _STATE, PRUNING_STATE)["pruner"]
    return found


def check_shapes(model: nn.Module, weights: Mapping[str, Any], plans: Iterable[Plan]) -> None:
    """Makes sure that a model has the shapes of a checkpoint, once plans are replayed on it.

    Raises:
        ValueError: If not; the message says what to do.
    """
    shapes = shapes_after(model, plans)
    # what is tied has several names, of which a cut gives one
    for name, tensor in model.state_dict(keep_vars=True).items():
        saved, shape = weights.get(name), shapes.get(id(tensor))
        if torch.is_tensor(saved) and shape is not None and saved.shape != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {tuple(shape)} in this model."
                " A compacted network is loaded with load_compact(checkpoint, model), or by a Trainer that has"
                " its PruningCallback, into a model as it was made, from a checkpoint that was saved with the"
                " callback in the Trainer, and not with weights_only: what was cut is in the callback's state."
            )
