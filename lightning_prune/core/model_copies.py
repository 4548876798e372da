"""Copies of models to try changes on, with parameters of their own or sharing memory with the original."""

from __future__ import annotations

import copy
from collections.abc import Container
from contextlib import suppress
from functools import partial
from inspect import isfunction, ismethod
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_prune.core.averages import recognise_twin

_Module = TypeVar("_Module", bound=nn.Module)


def copy_model(model: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """Return a deep copy of a model that runs uncompiled.

    The compiled methods that ``torch.compile`` sets on a module are removed from the copy: they are bound to
    the original and would run it instead. Hooks, and functions in attributes, whose closures refer to the
    original's modules or tensors refer to those of the copy.

    Args:
        model: The model; it is not changed.
        memo: As for ``copy.deepcopy``.

    Raises:
        ValueError: If the model cannot be copied.
    """
    memo = {**_not_copied(model), **(memo or {})}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # a user's attribute may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error!r}), and a copy is what things are tried on: keep"
            " what cannot be copied elsewhere, give its own class a __deepcopy__, or give the module that holds"
            " it a __getstate__ that leaves it out, and a __setstate__ that makes it anew."
        ) from error
    for module in twin.modules():
        for name in _compiled(module):
            del module.__dict__[name]
        if isinstance(module, OptimizedModule):
            module.forward = module._orig_mod.__call__
        for owned in (vars(module), *(value for value in vars(module).values() if isinstance(value, dict))):
            owned |= {key: _rebound(value, memo) for key, value in owned.items()}
    recognise_twin(model, twin)
    return twin


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return a value in which functions and bound methods refer to copies instead of the originals.

    Args:
        value: A function, bound method, module or tensor, a container of these, or anything else.
        memo: The copies, by ``id`` of the original; those of functions and of their cells are added.
    """
    leaves, structure = tree_flatten(value)
    rebound = [_rebound_leaf(leaf, memo) for leaf in leaves]
    changed = any(one is not other for one, other in zip(leaves, rebound, strict=True))
    return tree_unflatten(rebound, structure) if changed else value


def _rebound_leaf(leaf: Any, memo: dict[int, Any]) -> Any:
    if ismethod(leaf) and id(leaf.__self__) in memo:
        return MethodType(leaf.__func__, memo[id(leaf.__self__)])
    if isinstance(leaf, partial):
        parts = leaf.func, leaf.args, leaf.keywords
        func, args, keywords = rebound = _rebound(parts, memo)
        return leaf if rebound is parts else type(leaf)(func, *args, **keywords)
    if isinstance(leaf, nn.Module | Tensor | FunctionType) and id(leaf) in memo:
        return memo[id(leaf)]
    if not isfunction(leaf) or not leaf.__closure__:
        return leaf
    cells = [memo.get(id(cell)) or CellType() for cell in leaf.__closure__]
    twin = FunctionType(leaf.__code__, leaf.__globals__, leaf.__name__, leaf.__defaults__, tuple(cells))
    twin.__kwdefaults__, twin.__dict__ = leaf.__kwdefaults__, leaf.__dict__
    memo[id(leaf)] = twin  # before its cells, one of which may hold the function itself
    for cell, own in zip(leaf.__closure__, cells, strict=True):
        if id(cell) not in memo:
            memo[id(cell)] = own
            with suppress(ValueError):  # a name that has no value yet
                own.cell_contents = _rebound(cell.cell_contents, memo)
    return twin


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to this module or its methods; submodules do not count."""
    return bool(_compiled(module))


def _compiled(module: nn.Module) -> list[str]:
    """Return the names of the attributes that ``torch.compile`` has set on a module."""
    return [
        name
        for name, value in vars(module).items()
        if name == "_compiled_call_impl" or _compiled_method(name, value)
    ]


def _not_copied(model: nn.Module) -> dict[int, Any]:
    """Return, by id, what takes the place of attributes that ``deepcopy`` rejects.

    Non-leaf tensors are detached. Scripted functions have no state, and are shared.
    """
    leaves = tree_leaves([vars(module) for module in model.modules()])
    tensors = (leaf for leaf in leaves if torch.is_tensor(leaf))
    detached = {id(tensor): tensor.detach() for tensor in tensors if not tensor.is_leaf}
    return detached | {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.jit.ScriptFunction)}


def _compiled_method(name: str, value: Any) -> bool:
    """Return whether an attribute is a compiled method that hides the method of the same name in the class."""
    original = vars(value).get("_torchdynamo_orig_callable") if isfunction(value) else None
    return ismethod(original) and original.__name__ == name


def copy_sharing_weights(model: nn.Module, own: Container[str] = ()) -> nn.Module:
    """Return a copy of a model whose parameters share memory with those of the model.

    Assigning to ``data`` of a parameter of the copy ends the sharing of that parameter.

    Args:
        model: The model; it changes only if shared parameters of the copy are written in place.
        own: Names of the parameters that are copied instead of shared.
    """
    shared = {
        id(each): nn.Parameter(each.data.clone() if name in own else each.data, each.requires_grad)
        for name, each in model.named_parameters()
    }
    return copy_model(model, shared)
