"""Analyses that were made before: one serves report, plan, pruning and compaction of a module."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from types import FunctionType
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.graph.rules import RULES
from lightning_prune.core.averages import averaged_names, is_apart
from lightning_prune.core.probes import ForwardProbe, Probe, tensors_in
from lightning_prune.core.tensors import named_tensors
from lightning_prune.core.trained import trains
from lightning_prune.units.groups import Units

_MOST_BYTES = 2**24  # of a key; a Trainer that a module refers to takes more
_MOST_ELEMENTS = 2**20  # of the other inputs of the passes that are kept


class Analysis(NamedTuple):
    """What an analysis has found.

    Attributes:
        units: The unit groups, and what is frozen.
        passes: The passes that trials have run, to compare the network with a smaller one.
    """

    units: Units
    passes: tuple[TrialPass, ...]


class _Key(pickle.Pickler):
    """What a module and an example are made of, as pickle sees it, to find out later whether they have changed.

    Args:
        model: The module.
        probe: Runs it on the example.

    Raises:
        Exception: If they refer to something that cannot be pickled, or to more than a Trainer does.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self._written = _Bounded()
        super().__init__(self._written)
        # by ``id``, which no other object has as long as these exist
        self._objects: dict[int, Callable[[], object]] = {}
        self._own = {id(tensor) for _, tensor in named_tensors(model)} | set(map(id, model.modules()))
        self.dump([(op, id(rule)) for op, rule in RULES.items()])
        self.dump(averaged_names(model))
        for each in probe.passes:
            if type(each) is not ForwardProbe:
                raise TypeError(f"a {type(each).__name__} may refer to anything")
            self.dump((each.training, each.arguments, each.keywords))
        for name, module in model.named_modules(remove_duplicate=False):
            self.dump((name, module, id(type(module)), is_apart(module), vars(module)))
        for name, tensor in named_tensors(model):
            self.dump((name, _kind(tensor), tensor.requires_grad, trains(tensor)))
        self.clear_memo()  # which keeps all of them alive

    def persistent_id(self, value: Any) -> object:
        """Return what stands for a tensor, function or module; ``None`` for what is pickled as it is."""
        if isinstance(value, ReferenceType):
            return id(value())
        outside = isinstance(value, Tensor) and id(value) not in self._own
        if not (outside or id(value) in self._own or isinstance(value, FunctionType)):
            return None
        self._objects[id(value)] = ref(value)
        return (id(value), value._version, _kind(value)) if outside else id(value)

    def alive(self) -> bool:
        """Return whether all objects still exist."""
        return all(each() is not None for each in self._objects.values())

    def same(self, other: _Key) -> bool:
        """Return whether two keys are of the same objects, which have not changed."""
        return self._written.getvalue() == other._written.getvalue()


class _Bounded(BytesIO):
    """A file in memory of limited size."""

    def write(self, data: Any) -> int:
        """Append some bytes.

        Raises:
            OverflowError: If these are too many.
        """
        if self.tell() > _MOST_BYTES:
            raise OverflowError
        return super().write(data)


def _kind(tensor: Tensor) -> object:
    """Return what changes when a tensor gets other data: shape, place in memory, type and device."""
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return (tuple(tensor.shape), tensor.data_ptr()) if dense else None, str(tensor.dtype), str(tensor.device)


class _Known(NamedTuple):
    """An analysis without its example, which may be large.

    Attributes:
        analysis: The analysis.
        key: What module and example were.
    """

    analysis: Analysis
    key: _Key


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()  # the last one of each module


def find_analysis(model: nn.Module, probe: Probe) -> Analysis | None:
    """Return the last analysis of a module, if neither it nor the example has changed since.

    Values of parameters and buffers may change, as in training: analyses do not depend on them. The example is
    the same if it consists of the same tensors, which nothing has written to.

    Args:
        model: The module.
        probe: Runs the module on the example.

    Returns:
        The analysis; ``None`` if there is none, or module or example hold objects whose changes cannot be seen.
    """
    known = _KNOWN.get(model)
    if known is None:
        return None
    key = _key(model, probe)
    if key is None or not known.key.alive() or not known.key.same(key):
        del _KNOWN[model]  # it may hold weights that the module has no more
        return None
    units, passes = known.analysis
    return Analysis(units, tuple(each.of_example(probe) for each in passes))


def keep_analysis(model: nn.Module, probe: Probe, analysis: Analysis) -> None:
    """Keep an analysis as long as the module exists, or until another one of it is kept.

    It is not kept if it would hold large inputs.

    Args:
        model: The module.
        probe: Ran it on the example.
        analysis: The analysis.
    """
    passes = tuple(each.without_example() for each in analysis.passes)
    key = _key(model, probe)
    if key is not None and _elements(passes) <= _MOST_ELEMENTS:
        _KNOWN[model] = _Known(Analysis(analysis.units, passes), key)


def _key(model: nn.Module, probe: Probe) -> _Key | None:
    with suppress(Exception):  # objects of users may refuse to be pickled in any way
        return _Key(model, probe)
    return None


def _elements(passes: Iterable[TrialPass]) -> int:
    """Return how many numbers the inputs of passes have."""
    probes = [probe for each in passes for probe in (each.probe, each.variant) if probe is not None]
    return sum(tensor.numel() for probe in probes for tensor in tensors_in(probe))
