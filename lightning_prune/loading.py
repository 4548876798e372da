"""Compacted networks out of checkpoints: the plan that travels in them is replayed before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.compaction import Plan, replay_
from lightning_prune.files import read
from lightning_prune.masks import unpack

_Module = TypeVar("_Module", bound=nn.Module)
_Hook = Callable[[Mapping[str, Any]], None]
_NAME = "on_load_checkpoint"


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
        checkpoint = read(checkpoint, "checkpoint")
    weights = checkpoint.get("state_dict")
    if weights is None:
        raise ValueError(f"checkpoint has no 'state_dict', only {sorted(checkpoint)}.")
    plans = plans_of(checkpoint)
    check_fits(model, weights, plans)
    for plan in plans:
        replay_(model, plan)
    model.load_state_dict(weights)
    return model


def plan_of(checkpoint: Mapping[str, Any], state_key: str) -> Plan | None:
    """The plan that the callback of this key has left in a checkpoint, if it compacted the network."""
    state = checkpoint.get("callbacks", {}).get(state_key) or {}
    found = state.get("pruner", {}).get("plan")
    return None if found is None else Plan.from_state(found)


def plans_of(checkpoint: Mapping[str, Any]) -> list[Plan]:
    """The plans of all callbacks, in their order."""
    found = (plan_of(checkpoint, key) for key in pruned_by(checkpoint))
    return [plan for plan in found if plan is not None]


def masks_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameter name to bool mask, True where kept: what the masks of all callbacks leave."""
    masks: dict[str, Tensor] = {}
    for key in pruned_by(checkpoint):
        for name, entry in checkpoint["callbacks"][key].get("pruner", {}).get("masks", {}).items():
            mask = unpack(entry["bits"], tuple(entry["shape"]))
            masks[name] = mask & masks.get(name, mask)
    return masks


def pruned_by(checkpoint: Mapping[str, Any]) -> list[str]:
    """State keys of the callbacks that have left something in a checkpoint, in their order."""
    callbacks = checkpoint.get("callbacks", {})
    return [key for key, state in callbacks.items() if key.startswith("PruningCallback") and state]


def shapes_after(model: nn.Module, plans: Iterable[Plan]) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a model's ``state_dict`` holds, once plans are replayed on it."""
    # what is tied has several names, of which a cut gives one
    tensors = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if torch.is_tensor(value)
    }
    shapes = {id(tensor): list(tensor.shape) for tensor in tensors.values()}
    for plan in plans:
        for cut in plan.cuts:
            shape = shapes.get(id(tensors.get(cut.name)), [])
            if cut.dim < len(shape):
                shape[cut.dim] = len(cut.kept)
    return {name: tuple(shapes[id(tensor)]) for name, tensor in tensors.items()}


def check_fits(model: nn.Module, weights: Mapping[str, Any], plans: list[Plan]) -> None:
    """Makes sure that a model has the shapes of a checkpoint, once plans are replayed on it.

    Raises:
        ValueError: If not; the message says what to do.
    """
    for name, shape in shapes_after(model, plans).items():
        saved = weights.get(name)
        if saved is not None and tuple(saved.shape) != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {shape} in this model."
                " A compacted network is loaded with load_compact(checkpoint, model), or by a Trainer that has"
                " its PruningCallback, from a checkpoint that was saved with the callback in the Trainer."
            )


class LoadHook:
    """Does something before and after a module's own ``on_load_checkpoint``, until it is released.

    Args:
        module: The LightningModule.
        before: Is given the checkpoint before the module's hook.
        after: Is given it afterwards, still before the weights are loaded.
    """

    def __init__(self, module: nn.Module, before: _Hook, after: _Hook) -> None:
        self._module = module
        self._before = before
        self._after = after
        self._hides = vars(module).get(_NAME)
        self._own = getattr(module, _NAME)
        vars(module)[_NAME] = self

    def __call__(self, checkpoint: Mapping[str, Any]) -> None:
        """Stands in for the module's own."""
        self._before(checkpoint)
        self._own(checkpoint)
        self._after(checkpoint)

    def __deepcopy__(self, memo: Any) -> LoadHook:
        return self  # a copy of the module is none of a Trainer's

    def release(self) -> None:
        """Takes the hook away, also from under another."""
        above = vars(self._module).get(_NAME)
        if above is self and self._hides is None:
            del vars(self._module)[_NAME]
        elif above is self:
            vars(self._module)[_NAME] = self._hides
        while isinstance(above, LoadHook):
            if above._hides is self:
                above._hides, above._own = self._hides, self._own
            above = above._hides
