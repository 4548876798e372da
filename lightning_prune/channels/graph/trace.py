"""Traces a forward pass: follows the labels of parameters and buffers through every ATen op that runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from lightning_prune.channels.graph.attention_calls import UnscaledAttention
from lightning_prune.channels.graph.calls import Call, changes_shape_in_place, schema_of, tensors_of
from lightning_prune.channels.graph.label_fields import Fields, merge_fields, partition, varying_dims
from lightning_prune.channels.graph.labels import Labels
from lightning_prune.channels.graph.origins import Origins
from lightning_prune.channels.graph.products import Product, products
from lightning_prune.channels.graph.recorder import OpRecord, PassRecord, op_record
from lightning_prune.channels.graph.rules import REPEATING, is_filled, rule_for
from lightning_prune.channels.graph.splits import Split
from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.core.model_copies import copy_sharing_weights
from lightning_prune.core.probes import Deadline, NotFollowedError, OpMode, math_attention, pass_mode
from lightning_prune.core.tensors import reachable_tensors

_log = logging.getLogger(__name__)
_SCALED = "feeds scaled_dot_product_attention, which scales by their number unless it is given a scale"
_MOST_LABELS = 2**25  # elements in the label fields of one tensor


class Trace(OpMode):
    """Dispatch mode that follows labels through one or several passes of a model.

    Args:
        model: The model; it is not changed.
        splits: As for :class:`TraceRecord`: for each of them labels are followed on their own.
        deadline: The time limit, checked at each op whose operands have labels.

    Attributes:
        records: For each split the labels of all tensors and the costs of all ops so far.
    """

    def __init__(self, model: nn.Module, splits: Iterable[Split], deadline: Deadline | None = None) -> None:
        super().__init__()
        self.records = [TraceRecord(model, split) for split in splits]
        self._model = model
        self._deadline = deadline
        self._origins = Origins()
        for record in self.records:
            record.line_of = self._origins.line
        self._counting = self._training = False
        self._place = ""
        self._steps: list[tuple[OpRecord, bool, frozenset[int]]] = []
        # not the tensors: PyTorch copies those that a factory has made if something refers to them
        self._outputs: list[TensorWeakRef] = []
        self._scaled: list[tuple[Labels, str, Tensor]] = []

    def follow(self, known: PassRecord, *, count: bool = False) -> None:
        """Trace one pass of a copy, with unfused attention, and freeze the labels of its outputs.

        All tensors that outlive the pass are outputs, whatever refers to them. Ops that neither these nor the
        model's parameters and buffers depend on freeze nothing.

        Args:
            known: The record of the pass.
            count: Whether to count the multiply-adds of this pass.

        Raises:
            NotFollowedError: If the pass does not run the same ops as before.
        """
        self._counting, self._training = count, known.probe.training
        self._steps = list(zip(known.steps, known.live, known.places, strict=True))[::-1]
        self._outputs = []
        copied = copy_sharing_weights(self._model, known.written)
        for record in self.records:
            record.label(copied)
        self._note_places(copied)
        self._scaled = []
        unscaled = UnscaledAttention(self._note_scaled)
        with pass_mode(copied, training=known.probe.training), math_attention(), self, unscaled:
            result = known.probe(copied)
        self._freeze_scaled()
        self._set_place("")
        self._check(not self._steps)
        for record in self.records:
            record.couple_slices()
        returned = reachable_tensors(result)
        held = {id(tensor) for tensor in returned}
        kept = [tensor for tensor in (each() for each in self._outputs) if tensor is not None]
        for output in (*kept, *returned):
            returns = id(output) in held
            why = "is the network's output" if returns else "is kept after the forward pass, as an output is"
            for record in self.records:
                for field in record.fields(output):
                    record.labels.freeze(field, why)
        self._outputs = []

    def _note_scaled(self, query: Tensor, key: Tensor) -> None:
        """Note the labels of channels by whose number scores of attention are scaled."""
        for record in self.records:
            for tensor in (query, key):
                along = partition(record.fields(tensor), [tensor.ndim - 1])[0]
                self._scaled += [(record.labels, self._place, field) for field in along]

    def _freeze_scaled(self) -> None:
        """Freeze these labels, when the ops of this are no longer taken for those of the pass."""
        for labels, place, field in self._scaled:
            labels.place = place
            labels.freeze(field, _SCALED)

    def _set_place(self, place: str) -> None:
        self._place = place
        for record in self.records:
            record.labels.place = place

    def _note_places(self, copied: nn.Module) -> None:
        """Let each module of a copy tell, while it runs, where the reasons to freeze labels arise."""
        outer: list[str] = []

        def enter(name: str, *_: Any) -> None:
            outer.append(self._place)
            self._set_place(name)

        def leave(*_: Any) -> None:
            self._set_place(outer.pop())

        for name, module in copied.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(partial(enter, name))
                module.register_forward_hook(leave, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, then the rule for its labels."""
        kwargs = kwargs or {}
        shape_before = args[0].shape if changes_shape_in_place(func) else None
        result = func(*args, **kwargs)
        outputs = tensors_of([result])
        step, live, outliving = self._steps.pop() if self._steps else (None, False, frozenset[int]())
        self._check(step == op_record(func, outputs))
        found = products(func, args, kwargs, result)
        for record in self.records:
            self._follow(Call(record, func, args, kwargs, outputs, shape_before), found, live=live)
        self._origins.note(Call(self.records[0], func, args, kwargs, outputs))
        self._outputs += [TensorWeakRef(outputs[place]) for place in outliving]
        return result

    def _follow(self, call: Call, found: Sequence[Product], *, live: bool) -> None:
        """Follow the labels of one record through an op.

        Args:
            call: The op.
            found: Its products.
            live: Whether the results of the pass may depend on it.
        """
        record, outputs = call.record, call.outputs
        read = record.note_read(call.tensors, outputs, multiplied=bool(found))
        if live:
            record.used |= read
        labelled = any(record.fields(tensor) or call.is_uniform(tensor) for tensor in call.tensors)
        record.op_factors = []
        if found or labelled or call.key in REPEATING:
            if self._deadline is not None:
                self._deadline.check()
            # an op that no result depends on may lose any value, but its operands must still agree in size
            with record.labels.without_freezing(not live):
                results = _followed(call)
            for output, fields in zip(outputs, results, strict=True):
                written = _writes_values(call) and _is_view(output)
                own = _write_through(call, output, fields) if written else fields
                record.set_fields(output, _bounded(call, own))
        if self._counting:
            # no product becomes smaller whose op has no rule
            lines = [*record.op_factors, *([] for _ in found)]
            record.op_costs += [(product.macs, each) for product, each in zip(found, lines, strict=False)]
        self._note_uniform(call)

    def _note_uniform(self, call: Call) -> None:
        """Record outputs with one value everywhere; forget tensors in memory that the op has written to."""
        uniform = call.record.uniform
        if schema_of(call.func).is_mutable:
            # in training mode dropout has its mean in place of a mask
            mean = self._training and call.func is torch.ops.aten.bernoulli_.float
            same = mean or is_filled(call)
            memory = {output.untyped_storage().data_ptr() for output in call.outputs}
            for tensor in list(uniform):
                if tensor.untyped_storage().data_ptr() in memory:
                    del uniform[tensor]
            uniform.update((output, True) for output in call.outputs if same and not _is_view(output))
        elif is_filled(call):
            uniform.update((output, True) for output in call.outputs)

    @staticmethod
    def _check(same: bool) -> None:
        """Raise NotFollowedError unless the model runs the same ops as its copy."""
        if not same:
            raise NotFollowedError(
                "the model takes another way through its code each time: no cut can be tried on it."
            )


def _followed(call: Call) -> Sequence[Fields]:
    """Return the label fields of each output of an op; freeze those of its inputs if its rule fails."""
    try:
        results = rule_for(call)(call)
        for output, fields in zip(call.outputs, results, strict=True):
            for field in fields:
                field.expand(output.shape)  # raises an error if it does not fit
        return results
    except Exception:  # an op may run in another form than its rule knows, as within a transform of functions
        _log.debug("the rule for %s failed", call.name, exc_info=True)
        for tensor in call.tensors:
            call.freeze(call.fields(tensor), f"reaches {call.name} in a form that is not followed")
        return [() for _ in call.outputs]


def _writes_values(call: Call) -> bool:
    return bool(schema_of(call.func).is_mutable) and not changes_shape_in_place(call.func)


def _bounded(call: Call, fields: Fields) -> Fields:
    """Return the fields; if they would take too much memory, freeze them and return none."""
    if sum(field.numel() for field in fields) <= _MOST_LABELS:
        return fields
    call.freeze(fields, "is mixed with so much else that following it takes too much memory")
    return ()


def _write_through(call: Call, part: Tensor, fields: Fields) -> Fields:
    """Give the tensor of which a part was written to the labels that it has now; freeze them if it cannot.

    Labels belong to tensor objects, so those of a tensor do not change with a view of it by themselves. It can
    have the labels of what is written that run over whole dimensions of it, along which it has labels already,
    or one value everywhere, as before a first part is written. Those that run along the part are frozen.

    Returns:
        The fields of the part.
    """
    before, find = call.fields(part), call.labels.find
    if len(before) == len(fields) and all(
        old.shape == new.shape and torch.equal(find(old), find(new))
        for old, new in zip(before, fields, strict=True)
    ):
        return fields
    base = part._base
    placed = [] if base is None else [_in_base(field, part, base) for field in fields]
    spread = [wide for wide in placed if wide is not None]
    if base is not None and (spread or not fields):
        own = [field for field, wide in zip(fields, placed, strict=True) if wide is not None]
        whole = call.is_uniform(base) or _all_dims(spread) <= _all_dims(call.fields(base))
        if whole and _all_dims(before) <= _all_dims(own):
            apart = tuple(field for field, wide in zip(fields, placed, strict=True) if wide is None)
            call.freeze(apart, "is written into a part of another tensor")
            call.record.set_fields(base, merge_fields(call.labels, (*call.fields(base), *spread)))
            return merge_fields(call.labels, (*before, *fields))
    call.freeze((*before, *fields), "is written into a part of another tensor")
    return fields


def _all_dims(fields: Sequence[Tensor]) -> frozenset[int]:
    return frozenset[int]().union(*map(varying_dims, fields))


def _in_base(field: Tensor, part: Tensor, base: Tensor) -> Tensor | None:
    """Return a field of a view as one of its base; ``None`` if it does not run over whole dimensions of it."""
    lines = list(zip(base.shape, base.stride(), strict=True))
    dims = sorted(varying_dims(field))
    try:
        places = [lines.index((part.shape[dim], part.stride(dim))) for dim in dims]
    except ValueError:
        return None
    order = sorted(range(len(dims)), key=lambda number: places[number])
    rest = [dim for dim in range(field.ndim) if dim not in dims]
    moved = field.permute(*rest, *(dims[number] for number in order))
    return moved.reshape([size if dim in places else 1 for dim, size in enumerate(base.shape)])


def _is_view(tensor: Tensor) -> bool:
    """Return whether a tensor does not fill its storage, as a view of a part of another tensor does not."""
    return (
        tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    )
