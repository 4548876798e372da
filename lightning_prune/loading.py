"""Compacted networks out of checkpoints: the plan that travels in them is replayed before weights load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.compaction import Plan, replay_

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
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a file cut short fails in many ways
            raise ValueError(f"checkpoint={checkpoint!r} cannot be read: {error}") from error
    assert isinstance(checkpoint, Mapping)
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
    keys = (key for key in checkpoint.get("callbacks", {}) if key.startswith("PruningCallback"))
    found = (plan_of(checkpoint, key) for key in keys)
    return [plan for plan in found if plan is not None]


def check_fits(model: nn.Module, weights: Mapping[str, Any], plans: list[Plan]) -> None:
    """Makes sure that a model has the shapes of a checkpoint, once plans are replayed on it.

    Raises:
        ValueError: If not; the message says what to do.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    for plan in plans:
        for cut in plan.cuts:
            if cut.name in shapes:
                shapes[cut.name][cut.dim] = len(cut.kept)
    for name, shape in shapes.items():
        saved = weights.get(name)
        if saved is not None and list(saved.shape) != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {tuple(shape)} in this model."
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
