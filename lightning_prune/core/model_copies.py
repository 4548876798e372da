"""Copies of models to try changes on, with memory of their own or with shared parameters."""

from __future__ import annotations

import copy
from collections.abc import Container
from inspect import isfunction, ismethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves

_Module = TypeVar("_Module", bound=nn.Module)


def copy_model(model: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A copy that runs its own code: what ``torch.compile`` has put on a module would run the module's.

    Args:
        model: Stays as it is.
        memo: As for ``copy.deepcopy``.

    Raises:
        ValueError: If it cannot be copied.
    """
    try:
        twin = copy.deepcopy(model, {**_results_of(model), **(memo or {})})
    except Exception as error:  # a user's attribute may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error!r}), and a copy is what things are tried on: keep"
            " what cannot be copied elsewhere, or give the class a __deepcopy__."
        ) from error
    for module in twin.modules():
        for name in _compiled(module):
            del module.__dict__[name]
        if isinstance(module, OptimizedModule):
            module.forward = module._orig_mod.__call__
    return twin


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has changed how the module itself runs, whatever it did to those within."""
    return bool(_compiled(module))


def _compiled(module: nn.Module) -> list[str]:
    """What ``torch.compile`` has put on a module."""
    return [
        name
        for name, value in vars(module).items()
        if name == "_compiled_call_impl" or _compiled_method(name, value)
    ]


def _results_of(model: nn.Module) -> dict[int, Tensor]:
    """What modules have kept of their passes, for ``copy.deepcopy``, which refuses to copy results."""
    kept = (leaf for module in model.modules() for leaf in tree_leaves(_attributes(module)))
    return {id(leaf): leaf.detach() for leaf in kept if torch.is_tensor(leaf) and not leaf.is_leaf}


def _attributes(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]


def _compiled_method(name: str, value: Any) -> bool:
    """Whether an attribute is a compiled method that stands before the class's own."""
    original = vars(value).get("_torchdynamo_orig_callable") if isfunction(value) else None
    return ismethod(original) and original.__name__ == name


def copy_sharing_weights(model: nn.Module, own: Container[str] = ()) -> nn.Module:
    """A copy whose parameters share the memory of the model's, unless they are given other ``data``.

    Args:
        model: Stays as it is, as long as nothing writes into the shared ones.
        own: Names of parameters that get memory of their own.
    """
    shared = {
        id(each): nn.Parameter(each.data.clone() if name in own else each.data, each.requires_grad)
        for name, each in model.named_parameters()
    }
    return copy_model(model, shared)
