"""The passes of a model: their records and traces."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.graph.recorder import PassRecord, record_pass
from lightning_prune.channels.graph.trace import Trace
from lightning_prune.channels.graph.trace_record import Split, TraceRecord
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, Probe


def check_same_ops(model: nn.Module, known: PassRecord) -> None:
    """Check that a pass runs the same ops when the model's weights change.

    Args:
        model: Is not changed.
        known: The record of the pass.

    Raises:
        ValueError: If it runs other ops with perturbed weights, or creates tensors of other shapes.
    """
    perturb_(copied := copy_model(model))
    try:
        steps = record_pass(copied, known.probe).steps
    except Exception as error:  # a user's forward may raise anything
        raise ValueError(
            f"{type(model).__name__} does not run when its weights change a little ({error!r}), as in trials of"
            " cuts: Unstructured prunes it."
        ) from error
    if steps != known.steps:
        raise ValueError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            " a little: channels cannot be followed through it. Unstructured prunes it."
        )


def record_passes(model: nn.Module, probe: Probe) -> list[PassRecord]:
    """Return the records of all passes of a probe.

    If none of them is in training mode, the first one is added in that mode, and left out if it fails: the
    model may need other arguments then. Of passes that run the same ops on the same weights the first one is
    kept.

    Args:
        model: Is not changed; each pass runs on a copy.
        probe: Runs the model; its further passes are recorded as well.

    Raises:
        ValueError: If the model cannot run on the example.
    """
    training = copy.copy(probe)
    training.training = True
    records: list[PassRecord] = []
    for each in probe.passes if any(each.training for each in probe.passes) else (*probe.passes, training):
        try:
            record = record_pass(copy_model(model), each)
        except Exception as error:  # a user's forward may raise anything
            if each is training:
                continue
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        if all((record.steps, record.reads) != (other.steps, other.reads) for other in records):
            records.append(record)
    return records


def trace_model(
    model: nn.Module, passes: Sequence[PassRecord], split: Split, deadline: Deadline | None = None
) -> TraceRecord:
    """Return the record of a trace of several passes.

    Args:
        model: Is not changed.
        passes: The records of the passes. Multiply-adds are counted for the first one.
        split: As for :class:`TraceRecord`.
        deadline: When to stop; ``None`` for no limit.
    """
    trace = Trace(model, split, deadline)
    for number, each in enumerate(passes):
        trace.follow(each, count=number == 0)
    return trace.record
