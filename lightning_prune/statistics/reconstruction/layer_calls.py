"""How layers are called in a pass: how often, and what reads what they give."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_prune.core.tensors import reachable_tensors
from lightning_prune.statistics.reconstruction.sum_terms import LayerAhead, Result, ResultsOfFunctions, SumTerms

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
# what they return in evaluation mode is what they are given
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_OTHER = -1  # a reader that is no numbered function


class LayerCalls(ResultsOfFunctions):
    """Sees a pass of a network.

    Args:
        model: The network.
        layers: Names of its layers.

    Attributes:
        counts: Name of each layer to how often it has run.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._norms = {
            id(each.running_mean): name
            for name, each in model.named_modules()
            if isinstance(each, _BatchNorm) and each.running_mean is not None
        }
        # by ``id``: a result, and the number of the last function that has written it
        self._results: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._readers: dict[int, set[int]] = {}
        self._names: dict[int, str] = {}
        self._terms: dict[int, list[int]] = {}  # of a sum, those that are results
        self._gains: dict[int, Tensor] = {}  # of batch norms in evaluation mode
        self._norm_calls: dict[int, tuple[str, int | None]] = {}  # to its name, and what it is given
        self._given: dict[str, int | None] = {}  # what a layer is called with, if that is one result alone
        self._begun: dict[str, int] = {}
        self._outputs: dict[str, int | None] = {}
        self._handles: list[RemovableHandle] = []
        for name in layers:
            layer = model.get_submodule(name)
            self._handles += (
                layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                layer.register_forward_hook(partial(self._leave, name)),
            )

    def look(self, run: Callable[[], object]) -> None:
        """Run a pass and see what happens."""
        try:
            with torch.no_grad(), self:
                result = run()
            self._note_reader(_OTHER, map(self._number_of, reachable_tensors(result)))  # the caller
        finally:
            for handle in self._handles:
                handle.remove()
            self._results.clear()

    def norm_of(self, name: str) -> str | None:
        """Return the name of the batch norm, of running statistics, that alone reads the output of a layer.

        Returns:
            ``None`` if there is none, or if it reads more than that.
        """
        norm, _ = self._norm_calls.get(self._reader_of(self._outputs.get(name)), (None, None))
        return norm if sum(each == norm for each, _ in self._norm_calls.values()) == 1 else None

    def terms_of(self, name: str) -> SumTerms | None:
        """Return what is added to the output of a layer, of that what can be known when the layer begins.

        A batch norm may come before the sum. What a sum gives may be the term of another one.

        Returns:
            ``None`` if there is no sum, or no term that could change.
        """
        number, terms, gain = self._outputs.get(name), list[int](), None
        while (reader := self._reader_of(number)) in self._terms.keys() | self._gains.keys():
            if reader in self._terms:
                terms += [each for each in self._terms[reader] if each != number]
            elif terms or gain is not None:
                break
            else:
                gain = self._gains[reader]
            number = reader
        begun = self._begun.get(name, 0)
        results = [Result(each, self._names[each]) for each in terms if each < begun]
        ahead = [self._ahead(each, begun) for each in terms if each >= begun]
        layers = [each for each in ahead if each is not None]
        return SumTerms(results, layers, gain) if results or layers else None

    def _ahead(self, number: int, begun: int) -> LayerAhead | None:
        """Return the layer that gives a result from another one that is there earlier."""
        norm, output = self._norm_calls.get(number, (None, number))
        layer = next((each for each, result in self._outputs.items() if result == output), None)
        given = self._given.get(layer) if layer is not None and self.counts[layer] == 1 else None
        if layer is None or given is None or given >= begun:
            return None
        return LayerAhead(layer, norm, Result(given, self._names[given]))

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._begun[name] = self.count
        self._given[name] = self._number_of(args[0]) if len(args) == 1 and not kwargs else None

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.counts[name] += 1
        alone = not (isinstance(output, tuple) and output)  # attention returns its weights, too
        self._outputs[name] = self._number_of(output if alone else output[0])

    def _number_of(self, given: object) -> int | None:
        result, number = self._results.get(id(given), (None, None))
        return number if result is not None and result() is given else None

    def _reader_of(self, number: int | None) -> int:
        """Return the only function that reads a result."""
        readers = self._readers.get(number, set()) if number is not None else set()
        return next(iter(readers)) if len(readers) == 1 else _OTHER

    def _note_reader(self, reader: int, read: Iterable[int | None]) -> None:
        for number in read:
            if number is not None:
                self._readers.setdefault(number, set()).add(reader)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note what it reads and what it is."""
        number, given = self.count, tree_leaves((args, kwargs))
        read = [self._number_of(each) for each in given]
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _DROPOUTS and any(result is each for each in given):
            return result
        counted = self.count > number
        if counted or not _looks(func):
            self._note_reader(number if counted else _OTHER, read)
        if func is Tensor.__setitem__:
            self._results.pop(id(args[0]), None)  # it is no longer what the function has returned
        if counted and isinstance(result, Tensor):
            self._names[number] = func.__name__
            if func in _ADDITIONS and not kwargs and [*map(_shape, args)] == [result.shape] * 2:
                self._terms[number] = [each for each in read if each is not None]
            elif func is F.batch_norm:
                self._note_norm(number, read[0], args, kwargs or {})
            self._results[id(result)] = weakref.ref(result), number
        return result

    def _note_norm(self, number: int, read: int | None, args: Any, kwargs: Any) -> None:
        call = signature(F.batch_norm).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if id(given["running_mean"]) in self._norms:
            self._norm_calls[number] = self._norms[id(given["running_mean"])], read
        if not given["training"]:
            scale = (given["running_var"] + given["eps"]).rsqrt()
            self._gains[number] = scale if given["weight"] is None else scale * given["weight"]


def _shape(given: object) -> torch.Size | None:
    return given.shape if isinstance(given, Tensor) else None


def _looks(func: Any) -> bool:
    """Return whether a function of a tensor reads an attribute, such as its shape."""
    return getattr(func, "__name__", "") in ("__get__", "size", "dim", "numel")
