"""The passes of a model: their records and traces."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from lightning_prune.channels.compaction.norms import open_norms_
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.graph.recorder import PassRecord, record_pass
from lightning_prune.channels.graph.splits import Split
from lightning_prune.channels.graph.trace import Trace
from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.probes import Deadline, Probe

_WHAT_IS_LEFT = "nothing can be cut out of it. Unstructured and Blocks set single weights or blocks to 0."


def check_same_ops(model: nn.Module, known: PassRecord) -> None:
    """Check that a pass runs the same ops when the model's weights change.

    What is computed from tensors whose shapes values decide, such as the boxes that a detector finds, has to
    run, and may have other shapes.

    Args:
        model: Is not changed.
        known: The record of the pass.

    Raises:
        ValueError: If it runs other ops with perturbed weights, or creates tensors of other shapes.
    """
    perturb_(copied := open_norms_(copy_model(model)))
    try:
        found = record_pass(copied, known.probe)
    except Exception as error:  # a user's forward may raise anything
        raise ValueError(
            f"{type(model).__name__} does not run when its weights change a little ({error!r}), as in trials of"
            f" cuts: {_WHAT_IS_LEFT}"
        ) from error
    if found.fixed_steps != known.fixed_steps:
        raise ValueError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            f" a little, so that channels cannot be followed through it: {_WHAT_IS_LEFT}"
        )


def record_passes(model: nn.Module, probe: Probe) -> list[PassRecord]:
    """Return the records of all passes of a probe.

    If none of them is in training mode, the first one that runs in that mode, too, is added in it: the model
    may need other arguments then. Of passes that run the same ops on the same weights the first one is kept.

    Args:
        model: Is not changed; each pass runs on a copy.
        probe: Runs the model; its further passes are recorded as well.

    Raises:
        ValueError: If the model cannot run on the example, or cannot be copied.
    """
    found: list[PassRecord] = []
    for each in probe.passes:
        twin = open_norms_(copy_model(model))
        try:
            found.append(record_pass(twin, each))
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
    if not any(each.training for each in probe.passes):
        found += _first_in_training(model, probe)
    records: list[PassRecord] = []
    for record in found:
        if all((record.steps, record.reads) != (other.steps, other.reads) for other in records):
            records.append(record)
    return records


def _first_in_training(model: nn.Module, probe: Probe) -> list[PassRecord]:
    """Return the record of the first pass of a probe that runs in training mode; empty if none does."""
    for each in probe.passes:
        training = copy.copy(each)
        training.training = True
        with suppress(Exception):  # a user's forward may raise anything
            return [record_pass(open_norms_(copy_model(model)), training)]
    return []


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
    trace = Trace(open_norms_(copy_sharing_weights(model)), split, deadline)
    for number, each in enumerate(passes):
        trace.follow(each, count=number == 0)
    return trace.record
