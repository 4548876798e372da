"""Copies of models to try changes on, with parameters of their own or sharing memory with the original."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
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

# values that a copy shares with the original
_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_PROTOCOL = {"__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__"}
_DICTS = {dict, OrderedDict}
_ROWS = {tuple, list, set}


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
    copies = _Copies(memo or {})
    try:
        twin = copies.of(model)
    except Exception as error:  # a user's attribute may raise anything
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error!r}), and a copy is what things are tried on: keep"
            " what cannot be copied elsewhere, give its own class a __deepcopy__, or give the module that holds"
            " it a __getstate__ that leaves it out, and a __setstate__ that makes it anew."
        ) from error
    copies.rebind()
    recognise_twin(model, twin)
    return twin


class _Copies:
    """Makes what ``copy.deepcopy`` makes of a model, several times faster: most modules need no protocol.

    Args:
        memo: As for ``copy.deepcopy``.
    """

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = dict(memo)
        # where copies may refer to an original: a dict and a key
        self._open: list[tuple[dict[Any, Any], Any]] = []

    def of(self, model: _Module) -> _Module:
        """Return the copy of a model; functions in it still refer to the original."""
        fresh = [module for module in model.modules() if id(module) not in self._memo]
        kinds = {kind for kind in set(map(type, fresh)) if _is_simple(kind)}
        simple = [module for module in fresh if type(module) in kinds]
        # first all of them, empty, for attributes may refer to modules that come later
        self._memo |= {id(module): type(module).__new__(type(module)) for module in simple}
        others = [module for module in fresh if id(module) not in self._memo]
        for module in fresh:
            self._keep_uncopied(vars(module).values())
        for module in reversed(simple):  # those within a module come after it, and it may copy itself by them
            compiled = _compiled(module)
            kept = {key: value for key, value in vars(module).items() if key not in compiled}
            self._fill(vars(self._memo[id(module)]), kept)
        twin: _Module = copy.deepcopy(model, self._memo)
        for module in others:
            if id(module) in self._memo:  # not within scripted modules
                self._finish(self._memo[id(module)])
        return twin

    def _fill(self, twin: dict[Any, Any], values: Mapping[Any, Any]) -> None:
        """Put copies of values into a dict."""
        for key, value in values.items():
            kind = type(value)
            if kind in _PLAIN:
                twin[key] = value
            elif id(value) in self._memo:
                twin[key] = self._memo[id(value)]
            elif kind in _DICTS and _PLAIN.issuperset(map(type, value)):  # of parameters, modules or hooks
                twin[key] = self._memo[id(value)] = kind()
                if value:
                    self._fill(twin[key], value)
            elif kind in _ROWS and _PLAIN.issuperset(map(type, value)):
                twin[key] = self._memo[id(value)] = kind(value)
            elif isinstance(value, Tensor) and value.is_leaf:
                twin[key] = copy.deepcopy(value, self._memo)
            else:
                twin[key] = copy.deepcopy(value, self._memo)
                self._open.append((twin, key))

    def _keep_uncopied(self, values: Iterable[Any]) -> None:
        """Note what takes the place of values that ``deepcopy`` rejects.

        Non-leaf tensors are detached. Scripted functions have no state, and are shared.
        """
        for value in values:
            kind = type(value)
            if kind in _PLAIN or isinstance(value, nn.Module):
                continue
            if isinstance(value, Tensor):
                if not value.is_leaf:
                    self._memo[id(value)] = value.detach()
            elif kind in _DICTS:
                if value:
                    self._keep_uncopied(value.values())
            elif kind in _ROWS:
                self._keep_uncopied(value)
            elif isinstance(value, torch.jit.ScriptFunction):
                self._memo[id(value)] = value
            else:  # another container that torch knows, or the only leaf of itself
                self._keep_uncopied(leaf for leaf in tree_leaves(value) if leaf is not value)

    def _finish(self, twin: nn.Module) -> None:
        """Let a module that ``deepcopy`` has made run uncompiled."""
        for name in _compiled(twin):
            del twin.__dict__[name]
        if isinstance(twin, OptimizedModule):
            twin.forward = twin._orig_mod.__call__
        own = vars(twin)
        for owned in (own, *(value for value in own.values() if isinstance(value, dict))):
            self._open += [(owned, key) for key in owned]

    def rebind(self) -> None:
        """Let functions of the copy refer to it."""
        for owned, key in self._open:
            if type(owned[key]) not in _PLAIN:
                owned[key] = _rebound(owned[key], self._memo)


def _is_simple(kind: type[Any]) -> bool:
    """Return whether a copy of a module of this class is an object with copies of its attributes."""
    bases = [each for each in kind.__mro__ if each not in (nn.Module, object)]
    own = any(vars(each).keys() & _PROTOCOL or vars(each).get("__slots__") for each in bases)
    # the __setstate__ of torch's modules fills in what those that were saved long ago lack
    of_torch = kind.__setstate__.__module__.startswith("torch.nn.")
    return of_torch and not own and kind not in copyreg.dispatch_table


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
    own = vars(module)
    functions = [name for name, value in own.items() if type(value) is FunctionType]
    methods = [name for name in functions if _is_compiled_method(name, own[name])]
    return [name for name in ("_compiled_call_impl",) if name in own] + methods


def _is_compiled_method(name: str, function: FunctionType) -> bool:
    """Return whether an attribute is a compiled method that hides the method of the same name in the class."""
    original = vars(function).get("_torchdynamo_orig_callable")
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
