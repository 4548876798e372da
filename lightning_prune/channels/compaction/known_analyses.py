"""Analyses that were made before: one serves report, plan, pruning and compaction of a module."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import TensorWeakRef

from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.graph.rules import RULES
from lightning_prune.core.averages import averaged_names, is_apart
from lightning_prune.core.probes import ForwardProbe, Probe
from lightning_prune.core.tensors import named_tensors
from lightning_prune.core.trained import trains
from lightning_prune.units.groups import Units

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_Key: TypeAlias = list[object]


class Analysis(NamedTuple):
    """What an analysis has found.

    Attributes:
        units: The unit groups, and what is frozen.
        passes: The passes that trials have run, to compare the network with a smaller one.
    """

    units: Units
    passes: tuple[TrialPass, ...]


class _Known(NamedTuple):
    """An analysis without its example, which may be large.

    Attributes:
        analysis: The analysis.
        model: What the module was made of.
        example: What the example was.
        tensors: Weak references to the tensors of the example.
    """

    analysis: Analysis
    model: _Key
    example: _Key
    tensors: list[TensorWeakRef]


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()  # the last one of each module


def find_analysis(model: nn.Module, probe: Probe) -> Analysis | None:
    """Return the last analysis of a module, if neither it nor the example has changed since.

    Values of weights may change, as in training: analyses do not depend on them.

    Args:
        model: The module.
        probe: Runs the module on the example.

    Returns:
        The analysis; ``None`` if there is none, or the example holds more than tensors and plain values.
    """
    known, example = _KNOWN.get(model), _example_key(probe)
    if known is None or example is None or any(each() is None for each in known.tensors):
        return None
    if (known.model, known.example) != (_model_key(model), example[0]):
        return None
    units, passes = known.analysis
    return Analysis(units, tuple(each.of_example(probe) for each in passes))


def keep_analysis(model: nn.Module, probe: Probe, analysis: Analysis) -> None:
    """Keep an analysis as long as the module exists, or until another one of it is kept."""
    example = _example_key(probe)
    if example is not None:
        without = Analysis(analysis.units, tuple(each.without_example() for each in analysis.passes))
        _KNOWN[model] = _Known(
            without, _model_key(model), example[0], [TensorWeakRef(each) for each in example[1]]
        )


def _example_key(probe: Probe) -> tuple[_Key, list[Tensor]] | None:
    """Return what tells an example from others, and its tensors; ``None`` if nothing does."""
    key: _Key = []
    tensors: list[Tensor] = []
    for each in probe.passes:
        if type(each) is not ForwardProbe:
            return None
        leaves, structure = tree_flatten((each.arguments, each.keywords))
        key += [each.training, str(structure)]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not leaf.is_inference():
                key.append((id(leaf), leaf._version))
                tensors.append(leaf)
            elif isinstance(leaf, _PLAIN):
                key.append((type(leaf), leaf))
            else:
                return None
    return key, tensors


def _model_key(model: nn.Module) -> _Key:
    """Return what an analysis depends on: what the module is made of, its weight averages, rules for ops."""
    key: _Key = [frozenset(RULES.items()), *averaged_names(model).items()]
    for name, module in model.named_modules(remove_duplicate=False):
        key += [name, id(module), type(module), is_apart(module)]
        key += [(attribute, _value_key(value)) for attribute, value in vars(module).items()]
    for name, tensor in named_tensors(model):
        kind = tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad
        key.append((name, id(tensor), *kind, trains(tensor)))
    return key


def _value_key(value: Any) -> object:
    """Return what tells the value of an attribute from another one."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict | list | tuple | set):
        with suppress(Exception):  # a user's key may raise anything
            leaves, structure = tree_flatten(value)
            return (str(structure), *(leaf if isinstance(leaf, _PLAIN) else id(leaf) for leaf in leaves))
    return id(value)
