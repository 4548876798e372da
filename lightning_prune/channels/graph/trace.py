"""Watches a model run and follows the labels of its parameters through every op that it really calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.liveness import OpRecord, OpRecorder, op_record
from lightning_prune.channels.graph.rules import FILLED, keeps_uniform, rule_for
from lightning_prune.core.probes import Deadline, copy_sharing_weights, math_attention

Split: TypeAlias = Callable[[Sequence[int]], int]

_MOST_LABELS = 2**25
_KINDS = (2, 3)  # queries, keys and values, or keys and values
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def last_dim(sizes: Sequence[int]) -> int:
    """The last of several dimensions: channels within groups."""
    return len(sizes) - 1


def head_dim(sizes: Sequence[int]) -> int:
    """Attention heads: the first, or the second where the first tells queries, keys and values apart."""
    return int(len(sizes) > 2 and sizes[0] in _KINDS)


def split_head_dim(sizes: Sequence[int]) -> int:
    """The same, where queries, keys and values are told apart first, and heads in a second step."""
    return int(sizes[0] in _KINDS)


def first_dim(sizes: Sequence[int]) -> int:
    """The first of several dimensions: whole groups."""
    return 0


class Trace(TorchDispatchMode):
    """Follows labels through one pass of a model, or several.

    Args:
        model: Each dimension of each of its parameters and floating-point buffers gets labels, the same ones
            in every trace.
        split: Where a labelled dimension becomes several, which of them is free, given their sizes.

    Attributes:
        split_used: Whether it made a difference which.
        labels: All labels, coupled and frozen by what ran.
        places: Tensor name to its labels, a line for each dimension.
        terms: Multiply-adds of each op that was counted, the labels along each dimension that they run over,
            and the names of the weights.
    """

    def __init__(self, model: nn.Module, split: Split = last_dim, deadline: Deadline | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = Labels()
        self.split_used = False
        self._split = split
        self._deadline = deadline
        self.places: dict[str, tuple[Tensor, ...]] = {}
        self.terms: list[tuple[int, list[Tensor], frozenset[str]]] = []
        self._counting = False
        self._factors: tuple[list[Tensor], frozenset[str]] = [], frozenset()
        nothing = torch.zeros(0, dtype=torch.int64)
        self._made: list[Tensor] = [nothing]
        self._read: list[Tensor] = [nothing]
        self._heads: list[Tensor] = [nothing]
        self._scales: list[Tensor] = [nothing]
        self._seen: set[str] = set()
        self._names: dict[int, str] = {}
        self._fields: Any = WeakTensorKeyDictionary()
        self._weights: Any = WeakTensorKeyDictionary()
        self._uniform: Any = WeakTensorKeyDictionary()
        self._steps: list[tuple[OpRecord, bool]] = []
        tensors = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_floating_point()  # whole numbers are indices, and go by position
        }
        sizes = [size for tensor in tensors.values() for size in tensor.shape]
        lines = iter(self.labels.new(sum(sizes)).split(sizes))
        for name, tensor in tensors.items():
            self.places[name] = tuple(next(lines) for _ in tensor.shape)
            self._names[id(tensor)] = name
            self._weights[tensor] = frozenset([name])
            self._fields[tensor] = tuple(
                line.view([-1 if dim == each else 1 for each in range(tensor.ndim)])
                for dim, line in enumerate(self.places[name])
                if tensor.shape[dim] > 1
            )
        for prefix, module in model.named_modules():
            if isinstance(module, _RECURRENT):
                why = f"is part of {prefix or 'the model'}, and {type(module).__name__} layers are not cut"
                for leaf, _ in module.named_parameters(prefix):
                    for line in self.places.get(leaf, ()):
                        self._made.append(line)
                        self.labels.freeze(line, why)

    @property
    def made(self) -> Tensor:
        """For each label whether a contraction made it: the outputs of weights, not their inputs."""
        return self._among(self._made)

    @property
    def reading(self) -> Tensor:
        """For each label whether it stands for an input of a weight."""
        return self._among(self._read)

    @property
    def attended(self) -> Tensor:
        """For each label whether it stands for an attention head, or for what is coupled to one."""
        roots = self.labels.find(torch.arange(len(self.labels)))
        return self._among([self.labels.find(torch.cat(self._heads))])[roots]

    @property
    def scales(self) -> Tensor:
        """For each label whether it stands for a place in the scale of a batch norm."""
        return self._among(self._scales)

    def _among(self, found: list[Tensor]) -> Tensor:
        flags = torch.zeros(len(self.labels), dtype=torch.bool)
        flags[torch.cat(found)] = True
        return flags

    @property
    def seen(self) -> frozenset[str]:
        """Names of the tensors that took part in what ran."""
        return frozenset(self._seen)

    def follow(self, model: nn.Module, run: Callable[[nn.Module], Any], *, count: bool = False) -> None:
        """Watches a pass, without gradients, with attention in its plain form; what it gives is frozen.

        Args:
            model: The one that this trace was made for.
            run: The pass, given a model. A copy runs it first, to see which ops have a part in what it gives:
                others freeze nothing.
            count: Whether its multiply-adds are counted.

        Raises:
            ValueError: If the model does not run the same ops as its copy.
        """
        self._counting = count
        copied = copy_sharing_weights(model)
        with torch.no_grad(), math_attention():
            with (tape := OpRecorder()):
                result = run(copied)
            live = tape.live((result, [*copied.parameters(), *copied.buffers()]))
            self._steps = list(zip(tape.steps, live, strict=True))[::-1]
            with self:
                result = run(model)
        self._check(not self._steps)
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                for field in self.fields(leaf):
                    self.labels.freeze(field, "is the network's output")

    def fields(self, tensor: Tensor) -> Fields:
        """The fields of a tensor."""
        found: Fields = self._fields.get(tensor, ())
        return found

    def of_weights(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight, or made of weights alone."""
        return tensor in self._weights

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether a tensor was made in the pass, of any size, with one value everywhere, as by ``zeros``."""
        return tensor in self._uniform

    def split(self, sizes: Sequence[int]) -> int:
        """Which of the dimensions that a labelled one becomes is free, given their sizes."""
        self.split_used = True
        return self._split(sizes)

    def note_outputs(self, field: Tensor) -> None:
        """Notes labels of what a contraction made."""
        self._made.append(_flat_copy(field))

    def note_inputs(self, field: Tensor) -> None:
        """Notes labels along which a contraction sums over a weight."""
        self._read.append(_flat_copy(field))

    def note_heads(self, field: Tensor) -> None:
        """Notes labels of attention heads."""
        self._heads.append(_flat_copy(field))

    def note_scales(self, field: Tensor) -> None:
        """Notes labels of the scale of a batch norm."""
        self._scales.append(_flat_copy(field))

    def note_macs(self, lines: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Notes the labels along each dimension that multiply-adds run over, and the operands."""
        names = (self._weights.get(tensor, frozenset[str]()) for tensor in tensors)
        self._factors = [_flat_copy(line) for line in lines], frozenset().union(*names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op, then its rule."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        step, live = self._steps.pop() if self._steps else (None, False)
        self._check(step == op_record(func, outputs))
        call = Call(self, func, args, kwargs, outputs)
        if all(tensor in self._weights for tensor in call.tensors):
            names = frozenset[str]().union(*(self._weights[tensor] for tensor in call.tensors))
            self._weights.update((output, names) for output in outputs)
        if live:
            self._seen.update(self._names.get(id(tensor), "") for tensor in call.tensors)
        macs = _macs(func, args, kwargs, result)
        if macs or any(self.fields(tensor) for tensor in call.tensors):
            if self._deadline is not None:
                self._deadline.check()
            self._factors = [], frozenset()
            # what is for nothing runs all the same: sizes have to agree, but no value matters
            with self.labels.lenient(not live):
                passed = rule_for(func)(call)
            for output, fields in zip(call.outputs, passed, strict=True):
                if func._schema.is_mutable and _is_view(output):
                    self._check_unchanged(output, fields)
                self._fields[output] = self._bounded(fields)
        if macs and self._counting:
            self.terms.append((macs, *self._factors))
        self._note_uniform(call)
        return result

    def _note_uniform(self, call: Call) -> None:
        if call.func._schema.is_mutable:
            memory = {output.untyped_storage().data_ptr() for output in call.outputs}
            for tensor in list(self._uniform):
                if tensor.untyped_storage().data_ptr() in memory:
                    del self._uniform[tensor]
        elif call.name in FILLED or (
            call.tensors and all(map(self.is_uniform, call.tensors)) and keeps_uniform(call.func)
        ):
            self._uniform.update((output, True) for output in call.outputs)

    def _bounded(self, fields: Fields) -> Fields:
        """Nothing, frozen, where labels would take more memory than the data."""
        if sum(field.numel() for field in fields) <= _MOST_LABELS:
            return fields
        for field in fields:
            self.labels.freeze(field, "is mixed with so much else that following it takes too much memory")
        return ()

    @staticmethod
    def _check(same: bool) -> None:
        if not same:
            raise ValueError(
                "the model takes another way through its code each time: no cut can be tried on it."
            )

    def _check_unchanged(self, part: Tensor, fields: Fields) -> None:
        """Labels follow the object: those that the whole does not have are frozen."""
        before = self.fields(part)
        same = len(before) == len(fields) and all(
            old.shape == new.shape and torch.equal(self.labels.find(old), self.labels.find(new))
            for old, new in zip(before, fields, strict=True)
        )
        for field in () if same else (*before, *fields):
            self.labels.freeze(field, "is written into a part of another tensor")


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiply-adds of an op, as torch counts them."""
    flops = flop_registry.get(func._overloadpacket)
    return 0 if flops is None else flops(*args, **kwargs, out_val=result) // 2


def _flat_copy(field: Tensor) -> Tensor:
    """Its labels, in memory of their own: a view would keep all that it is a part of."""
    return field.flatten().clone()


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
