"""Watches a model run and follows the labels of its parameters through every op that it really calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_prune.channels.graph.calls import Call
from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.liveness import OpRecord, OpRecorder, op_record
from lightning_prune.channels.graph.rules import FILLED, keeps_uniform, rule_for
from lightning_prune.channels.graph.trace_record import Split, TraceRecord
from lightning_prune.core.model_copies import copy_sharing_weights
from lightning_prune.core.probes import Deadline, math_attention

_MOST_LABELS = 2**25
_KINDS = (2, 3)  # queries, keys and values, or keys and values


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
        model: The model.
        split: As for :class:`TraceRecord`.
        deadline: When to stop.

    Attributes:
        record: What was found.
    """

    def __init__(self, model: nn.Module, split: Split = last_dim, deadline: Deadline | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = TraceRecord(model, split)
        self._deadline = deadline
        self._counting = False
        self._steps: list[tuple[OpRecord, bool]] = []

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
                for field in self.record.fields(leaf):
                    self.record.labels.freeze(field, "is the network's output")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op, then its rule."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        step, live = self._steps.pop() if self._steps else (None, False)
        self._check(step == op_record(func, outputs))
        record = self.record
        call = Call(record, func, args, kwargs, outputs)
        if all(map(call.of_weights, call.tensors)):
            names = frozenset[str]().union(*(record.weights[tensor] for tensor in call.tensors))
            record.weights.update((output, names) for output in outputs)
        if live:
            record.used.update(record.names.get(id(tensor), "") for tensor in call.tensors)
        macs = _macs(func, args, kwargs, result)
        if macs or any(record.fields(tensor) for tensor in call.tensors):
            if self._deadline is not None:
                self._deadline.check()
            record.factors = [], frozenset()
            # what is for nothing runs all the same: sizes have to agree, but no value matters
            with record.labels.lenient(not live):
                passed = rule_for(func)(call)
            for output, fields in zip(call.outputs, passed, strict=True):
                if func._schema.is_mutable and _is_view(output):
                    self._check_unchanged(output, fields)
                record.set_fields(output, self._bounded(fields))
        if macs and self._counting:
            record.terms.append((macs, *record.factors))
        self._note_uniform(call)
        return result

    def _note_uniform(self, call: Call) -> None:
        uniform = self.record.uniform
        if call.func._schema.is_mutable:
            memory = {output.untyped_storage().data_ptr() for output in call.outputs}
            for tensor in list(uniform):
                if tensor.untyped_storage().data_ptr() in memory:
                    del uniform[tensor]
        elif call.name in FILLED or (
            call.tensors and all(map(call.is_uniform, call.tensors)) and keeps_uniform(call.func)
        ):
            uniform.update((output, True) for output in call.outputs)

    def _bounded(self, fields: Fields) -> Fields:
        """Nothing, frozen, where labels would take more memory than the data."""
        if sum(field.numel() for field in fields) <= _MOST_LABELS:
            return fields
        for field in fields:
            self.record.labels.freeze(
                field, "is mixed with so much else that following it takes too much memory"
            )
        return ()

    @staticmethod
    def _check(same: bool) -> None:
        if not same:
            raise ValueError(
                "the model takes another way through its code each time: no cut can be tried on it."
            )

    def _check_unchanged(self, part: Tensor, fields: Fields) -> None:
        """Labels follow the object: those that the whole does not have are frozen."""
        before = self.record.fields(part)
        same = len(before) == len(fields) and all(
            old.shape == new.shape and torch.equal(self.record.labels.find(old), self.record.labels.find(new))
            for old, new in zip(before, fields, strict=True)
        )
        for field in () if same else (*before, *fields):
            self.record.labels.freeze(field, "is written into a part of another tensor")


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Multiply-adds of an op, as torch counts them."""
    flops = flop_registry.get(func._overloadpacket)
    return 0 if flops is None else flops(*args, **kwargs, out_val=result) // 2


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
