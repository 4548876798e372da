"""Label rules for recurrent layers and cells, each call of which is one op, and for packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_prune.channels.graph.calls import Call, tensors_of
from lightning_prune.channels.graph.coupling_rules import line
from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.labels import NOT_CUT
from lightning_prune.channels.graph.trace_record import Role

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_COMPUTED = "is the weight of a recurrent layer, computed in a way that is not followed"
_UNREAD = "reads values that cannot shrink with it, such as an input"
_POSITIONS = "lies along the batch or the steps of a recurrent layer"


class _Cell(NamedTuple):
    """The tensors of one direction of one layer.

    Attributes:
        reading: The weight that reads the input: gates x hidden units, inputs.
        repeating: The weight that reads the state before: gates x hidden units, units of the state.
        biases: What is added to the gates.
        projecting: The weight that makes the state of the hidden units, if they are not the state themselves.
    """

    reading: Tensor
    repeating: Tensor
    biases: Sequence[Tensor]
    projecting: Tensor | None


def recurrent(call: Call) -> Sequence[Fields]:
    """Couple the gates of each hidden unit, and its weights in all layers and directions.

    All of these have the same number of hidden units, and of projected ones, so unit ``i`` is removed from
    all of them. Layers read both directions of the layer before. A given state is coupled with the units, as
    the state that results is; labels along batch and steps are frozen.
    """
    cells = _cells(call)
    layered = call.argument("params") is not None
    directions = 2 if call.argument("bidirectional") else 1
    gates = _GATES[call.name.removesuffix("_cell")]
    units = line(call, cells[0].reading, 0, _COMPUTED).view(gates, -1)[0]
    states = units if cells[0].projecting is None else line(call, cells[0].projecting, 0, _COMPUTED)
    if states is not units:
        call.record.note_least(units, len(states) + 1)  # torch.lstm takes equal numbers for no projection
    for number, cell in enumerate(cells):
        _couple_cell(call, cell, units, states, gates)
        if number >= directions:
            call.labels.couple(line(call, cell.reading, 1, _COMPUTED), states.repeat(directions), _UNREAD)
        elif not call.is_uniform(call.args[0]):
            read = _features(call, call.args[0])
            call.labels.couple(line(call, cell.reading, 1, _COMPUTED), read, _UNREAD)
    for given, own in zip(tensors_of([call.argument("hx")]), (states, units), strict=False):
        if not call.is_uniform(given):
            call.labels.couple(_features(call, given), own, NOT_CUT)
    made = [states.repeat(directions), states, units] if layered else [states, units]
    return [
        (own.view([1] * (output.ndim - 1) + [-1]),) if len(own) > 1 else ()
        for output, own in zip(call.outputs, made, strict=False)
    ]


def _cells(call: Call) -> list[_Cell]:
    """Return the tensors of each layer, and of each direction in it, in order."""
    weights = call.argument("params")
    count = 1
    if weights is None:
        weights = tensors_of(call.args[2:])
    else:
        count = call.argument("num_layers") * (2 if call.argument("bidirectional") else 1)
    size = len(weights) // count
    found = []
    for start in range(0, len(weights), size):
        reading, repeating, *others = weights[start : start + size]
        biases = [each for each in others if each.ndim == 1]
        found.append(_Cell(reading, repeating, biases, next((each for each in others if each.ndim == 2), None)))
    return found


def _couple_cell(call: Call, cell: _Cell, units: Tensor, states: Tensor, gates: int) -> None:
    """Couple what belongs to each hidden unit and each unit of the state, and note roles and multiply-adds."""
    record = call.record
    for tensor in (cell.reading, cell.repeating, *cell.biases):
        call.labels.couple(line(call, tensor, 0, _COMPUTED).view(gates, -1), units)
    call.labels.couple(line(call, cell.repeating, 1, _COMPUTED), states)
    matrices = [cell.reading, cell.repeating]
    if cell.projecting is not None:
        call.labels.couple(line(call, cell.projecting, 0, _COMPUTED), states)
        call.labels.couple(line(call, cell.projecting, 1, _COMPUTED), units)
        matrices.append(cell.projecting)
    for matrix in matrices:
        outputs, inputs = (line(call, matrix, dim, _COMPUTED) for dim in (0, 1))
        record.note(Role.OUTPUT, outputs)
        record.note(Role.INPUT, inputs)
        record.note_macs([outputs, inputs])


def _features(call: Call, tensor: Tensor) -> Tensor:
    """Return the labels along the last dimension; freeze those along the others."""
    last = tensor.ndim - 1
    call.freeze_along(call.fields(tensor), frozenset(range(last)), _POSITIONS)
    return line(call, tensor, last, _POSITIONS)


def pack(call: Call) -> Sequence[Fields]:
    """Return the labels of the features of sequences that become one row a step; freeze all others."""
    fields = call.freeze_along(call.fields(call.args[0]), frozenset((0, 1)), _POSITIONS)
    return [tuple(field[0] for field in fields), ()]


def unpack(call: Call) -> Sequence[Fields]:
    """Return the labels of the features of packed sequences, which get dimensions for batch and steps."""
    fields = call.freeze_along(call.fields(call.args[0]), frozenset((0,)), _POSITIONS)
    return [tuple(field[None] for field in fields), ()]
