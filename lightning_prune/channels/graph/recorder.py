"""Records the ops of a pass: which of them its outputs depend on, and which tensors outlive it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lightning_prune.channels.graph.calls import tensors_of, values_decide_shape, written_tensors
from lightning_prune.core.probes import OpMode, Probe, math_attention, pass_mode, relative_difference
from lightning_prune.core.tensors import named_tensors, reachable_tensors

OpRecord: TypeAlias = tuple[Any, tuple[torch.Size, ...]]
_Memory: TypeAlias = frozenset[StorageWeakRef]


class PassRecord(NamedTuple):
    """What one pass of a model did.

    Attributes:
        probe: Runs the pass.
        steps: For each op, in order, the op and the shapes of its outputs.
        reads: For each op the names of the parameters and buffers that it reads.
        decided: For each op whether values may have decided the shapes of its outputs, as those of ``nonzero``,
            or of what is computed from these.
        live: For each op whether the outputs of the pass, or the model's tensors, may depend on it.
        places: For each op the numbers of its outputs that outlive the pass.
        written: Names of the parameters that the pass has written to, or given other data.
        kept_elsewhere: Whether a tensor outlives the pass to which the result does not refer.
        gives_nan: Whether an output has a value that is no number.
        number: Which of the passes of the example's probe it is.
        small: The record of a pass that does the same on smaller inputs, if there is one.
        runs_in_training: Whether the model runs the same ops in training mode.
    """

    probe: Probe
    steps: list[OpRecord]
    reads: list[tuple[str, ...]]
    decided: list[bool]
    live: list[bool]
    places: list[frozenset[int]]
    written: frozenset[str]
    kept_elsewhere: bool
    gives_nan: bool
    number: int = 0
    small: PassRecord | None = None
    runs_in_training: bool = False

    @property
    def fixed_steps(self) -> list[OpRecord]:
        """The steps whose shapes no values have decided."""
        return [step for step, decided in zip(self.steps, self.decided, strict=True) if not decided]

    @property
    def elements(self) -> int:
        """The number of elements that the ops of the pass return, which says how long it takes."""
        return sum(prod(shape) for _, shapes in self.steps for shape in shapes)

    def same_ops(self, other: PassRecord) -> bool:
        """Return whether two passes run the same ops, which return the same shapes, on the same weights."""
        return (self.steps, self.reads) == (other.steps, other.reads)

    def same_way(self, other: PassRecord) -> bool:
        """Return whether two passes run the same ops on the same weights, on inputs of any size.

        A dimension of one element counts as another way: its strides and broadcasting differ.
        """

        def way(record: PassRecord) -> list[object]:
            ops = [(op, [[min(size, 2) for size in shape] for shape in shapes]) for op, shapes in record.steps]
            told = record.live, record.places, record.written, record.kept_elsewhere, record.gives_nan
            return [ops, record.reads, *told]

        return way(self) == way(other)


def record_pass(model: nn.Module, probe: Probe) -> PassRecord:
    """Run a pass of a model with unfused attention, and return the record; the model's state may change."""
    before = {name: each.data_ptr() for name, each in model.named_parameters()}
    with pass_mode(model, training=probe.training), math_attention(), OpRecorder(model) as recorder:
        result = probe(model)
    outputs = recorder.outputs(result)
    replaced = {name for name, each in model.named_parameters() if before.get(name) != each.data_ptr()}
    return PassRecord(
        probe,
        recorder.steps,
        recorder.reads,
        recorder.decided,
        recorder.live(result),
        recorder.places(result),
        frozenset(recorder.written | replaced),
        recorder.kept_elsewhere(result),
        relative_difference(outputs, outputs) > 0,
    )


class _Made(NamedTuple):
    """A tensor that an op returned: numbers of the op and of its output, and a weak reference."""

    op: int
    place: int
    tensor: TensorWeakRef


class OpRecorder(OpMode):
    """Dispatch mode that records each op of one pass.

    A tensor outlives the pass if anything still refers to it afterwards: the result, whatever its type, an
    attribute of a module, a hook, a closure. Tensors that are computed from parameters and buffers alone, such
    as a weight with its norm applied, do not count.

    Args:
        model: The model that runs.

    Attributes:
        steps: For each op, in order, the op and the shapes of its outputs.
        reads: For each op the names of the parameters and buffers that it reads.
        decided: For each op whether values may have decided the shapes of its outputs.
        written: Names of the parameters that the pass has written to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[OpRecord] = []
        self.reads: list[tuple[str, ...]] = []
        self.decided: list[bool] = []
        # for each op, the memory that it reads and the memory that it writes
        self._traffic: list[tuple[_Memory, _Memory]] = []
        self._made: list[_Made] = []
        self.written: set[str] = set()
        # by memory, since a parameter may be written to through its ``data`` or a view
        self._names = {each: name for name, tensor in model.named_parameters() for each in memory_of([tensor])}
        own = list(named_tensors(model))
        self._own = [tensor for _, tensor in own]
        self._own_memory = memory_of(self._own)
        self._own_names = {id(tensor): name for name, tensor in own}
        self._static: Any = WeakTensorKeyDictionary((tensor, True) for tensor in self._own)
        # memory of tensors that were made of weights or of nothing, and that data was written to
        self._filled: set[StorageWeakRef] = set()
        self._decided: Any = WeakTensorKeyDictionary()

    def live(self, result: Any) -> list[bool]:
        """Return for each op whether the outputs of the pass, or the model's tensors, may depend on it.

        Args:
            result: The result of the pass.
        """
        memory = set(memory_of([*self.outputs(result), *self._own]))
        found = []
        for reads, writes in reversed(self._traffic):
            found.append(not memory.isdisjoint(writes))
            if found[-1]:
                memory |= reads
        return found[::-1]

    def outputs(self, result: Any) -> list[Tensor]:
        """Return the tensors that outlive the pass, in the order in which they were made.

        Parameters and buffers that the result refers to come last.

        Args:
            result: The result of the pass.
        """
        alive = [each.tensor() for each in self._outliving(result)]
        made = {id(tensor): tensor for tensor in alive if tensor is not None}
        held = [tensor for tensor in reachable_tensors(result) if id(tensor) in self._own_names]
        return [*made.values(), *(tensor for tensor in held if id(tensor) not in made)]

    def places(self, result: Any) -> list[frozenset[int]]:
        """Return for each op the numbers of its outputs that outlive the pass.

        Args:
            result: The result of the pass.
        """
        found: list[set[int]] = [set() for _ in self.steps]
        for each in self._outliving(result):
            found[each.op].add(each.place)
        return [frozenset(places) for places in found]

    def kept_elsewhere(self, result: Any) -> bool:
        """Return whether a tensor outlives the pass to which the result does not refer.

        Args:
            result: The result of the pass.
        """
        known = {id(tensor) for tensor in reachable_tensors(result)}
        return any(id(each.tensor()) not in known for each in self._outliving(result))

    def _outliving(self, result: Any) -> list[_Made]:
        known = {id(tensor) for tensor in reachable_tensors(result)}
        alive = self._alive()
        if any(id(each.tensor()) not in known for each in alive):
            gc.collect(1)  # reference cycles of the pass may hold what nothing else refers to
            alive = self._alive()
        return alive

    def _alive(self) -> list[_Made]:
        """Return the tensors that something refers to, except for torch itself: a view holds its base."""
        found = [each for each in self._made if self._depends_on_data(each.tensor())]
        bases = {id(each.tensor()._base) for each in found}
        return [
            each for each in found if id(each.tensor()) not in bases or _references(each.tensor) > _of_a_base()
        ]

    def _depends_on_data(self, tensor: Tensor | None) -> bool:
        return tensor is not None and not self._is_static(tensor)

    def _is_static(self, tensor: Tensor) -> bool:
        return tensor in self._static and self._filled.isdisjoint(memory_of([tensor]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and record it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, outputs = tensors_of((*args, *kwargs.values())), tensors_of([result])
        number = len(self.steps)
        self.steps.append(op_record(func, outputs))
        self.reads.append(tuple(self._own_names[id(each)] for each in given if id(each) in self._own_names))
        written = written_tensors(func, args, kwargs)
        self.written |= {self._names[each] for each in memory_of(written) if each in self._names}
        self._traffic.append((memory_of(given), memory_of(outputs + written)))
        static = all(map(self._is_static, given))
        if written and not static:
            self._filled |= memory_of(written) - self._own_memory
        # the size of a constant may be that of a tensor whose size values have decided
        constant = not given or func is torch.ops.aten.lift_fresh.default
        decided = bool(self._decided) if constant else any(each in self._decided for each in given)
        self.decided.append(decided or values_decide_shape(func, args))
        for place, tensor in enumerate(outputs):
            if self.decided[-1]:
                self._decided[tensor] = True
            self._made.append(_Made(number, place, TensorWeakRef(tensor)))
            if static:
                self._static[tensor] = True
            elif id(tensor) not in self._own_names:
                self._static.pop(tensor, None)
        return result


def op_record(func: Any, outputs: Sequence[Tensor]) -> OpRecord:
    """Return the record of one op: the op and the shapes of the tensors that it returned."""
    return func, tuple(torch.Size() if tensor.is_nested else tensor.shape for tensor in outputs)


def memory_of(tensors: Iterable[Tensor]) -> _Memory:
    """Return weak references to the storages of tensors, which keep their addresses from being reused.

    Sparse tensors have none.
    """
    dense = (tensor for tensor in tensors if tensor.layout is torch.strided)
    return frozenset(StorageWeakRef(tensor.untyped_storage()) for tensor in dense)


def _references(tensor: TensorWeakRef) -> int:
    """Return how many references to a tensor Python counts."""
    found = tensor()
    return sys.getrefcount(found)


@cache
def _of_a_base() -> int:
    """Return how many references Python counts to a tensor that only a view of it holds."""
    base = torch.zeros(2)
    view, reference = base.view(1, 2), TensorWeakRef(base)
    del base
    count = _references(reference)
    del view
    return count
