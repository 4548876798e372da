"""The passes of a model: their records and traces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.channels.compaction.example_variants import reduce_sizes
from lightning_prune.channels.compaction.norms import open_norms_
from lightning_prune.channels.graph.recorder import PassRecord, record_pass
from lightning_prune.channels.graph.splits import Split
from lightning_prune.channels.graph.trace import Trace
from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.probes import Deadline, NotFollowedError, Probe
from lightning_prune.core.progress import count_pass

_FEW_ELEMENTS = 2**22  # of all tensors of a pass: with fewer, their size is not what takes time
_CHOSEN = (
    "where values choose what runs, as tokens do with experts, give an example so large that all of it runs;"
    " otherwise "
)
_WHAT_IS_LEFT = (
    "nothing can be cut out of it as a whole. Channels(include=...) follows a part alone that does not do so;"
    " Unstructured and Blocks set single weights or blocks to 0."
)


def check_same_ops(model: nn.Module, perturbed: nn.Module, known: PassRecord) -> None:
    """Check that a pass runs the same ops when the model's weights change.

    What is computed from tensors whose shapes values decide, such as the boxes that a detector finds, has to
    run, and may have other shapes.

    Args:
        model: Is not changed.
        perturbed: A copy of it with other weights; is not changed.
        known: The record of the pass.

    Raises:
        NotFollowedError: If it runs other ops with perturbed weights, or creates tensors of other shapes.
    """
    known = known.small or known
    try:
        found = record_pass(open_norms_(copy_sharing_weights(perturbed, known.written)), known.probe)
    except Exception as error:  # a user's forward may raise anything
        raise NotFollowedError(
            f"{type(model).__name__} does not run when its weights change a little ({error!r}), as in trials of"
            " cuts",
            _WHAT_IS_LEFT,
        ) from error
    if found.fixed_steps != known.fixed_steps:
        raise NotFollowedError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            " a little, so that channels cannot be followed through it",
            f"{_CHOSEN}{_WHAT_IS_LEFT}" if any(known.decided) else _WHAT_IS_LEFT,
        )


def record_passes(model: nn.Module, probe: Probe, deadline: Deadline | None = None) -> list[PassRecord]:
    """Return the records of all passes of a probe.

    If none of them is in training mode, the first one that also runs in that mode is recorded there as well:
    the model may need other arguments then. Of passes that run the same ops on the same weights the first one
    is kept.

    Args:
        model: Is not changed; each pass runs on a copy.
        probe: Runs the model; its further passes are recorded as well.
        deadline: When to stop; ``None`` for no limit.

    Raises:
        NotFollowedError: If the model cannot run on the example.
        ValueError: If it cannot be copied, or the deadline has passed.
    """
    recorder = _Recorder(model, deadline)
    found: list[PassRecord] = []
    for number, each in enumerate(probe.passes):
        try:
            record = recorder.record(each)._replace(number=number)
        except Exception as error:  # a user's forward may raise anything
            raise NotFollowedError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        known = any(map(record.same_ops, found))
        found.append(record if known else recorder.with_reduced(record))
    if not any(each.training for each in probe.passes):
        found = recorder.with_training_mode(found)
    return [
        record
        for number, record in enumerate(found)
        if record.runs_in_training or not any(map(record.same_ops, found[:number]))
    ]


class _Recorder:
    """Records passes on copies of a model.

    The copies share the memory of one that has memory of its own, but for parameters that passes write to.

    Args:
        model: Is not changed.
        deadline: When to stop; ``None`` for no limit.
    """

    def __init__(self, model: nn.Module, deadline: Deadline | None) -> None:
        self._model, self._deadline = model, deadline
        self._shared = copy_model(model)
        self._written = frozenset[str]()

    def record(self, probe: Probe) -> PassRecord:
        """Return the record of a pass; let through any error of it."""
        count_pass()
        try:
            record = record_pass(open_norms_(copy_sharing_weights(self._shared, self._written)), probe)
        except Exception:
            self._shared = copy_model(self._model)  # nobody knows what it has written before
            raise
        if not record.written <= self._written:  # it has changed memory that copies share
            self._written |= record.written
            self._shared = copy_model(self._model)
        return record

    def record_if_runs(self, probe: Probe) -> PassRecord | None:
        """Return the record of a pass; ``None`` if it fails.

        Raises:
            ValueError: If the deadline has passed.
        """
        if self._deadline is not None:
            self._deadline.check()
        try:
            return self.record(probe)
        except Exception:  # a user's forward may raise anything on inputs of another size, or in another mode
            return None

    def with_training_mode(self, records: list[PassRecord]) -> list[PassRecord]:
        """Return records with what the first pass that runs in training mode does there."""
        for number, each in enumerate(records):
            found = self.record_if_runs(each.probe.in_training_mode())
            if found is None:
                continue
            small = None if each.small is None else self.record_if_runs(each.small.probe.in_training_mode())
            if found.same_ops(each) and (
                each.small is None or (small is not None and small.same_ops(each.small))
            ):
                return [*records[:number], each._replace(runs_in_training=True), *records[number + 1 :]]
            return [*records, self.with_reduced(found._replace(number=each.number))]
        return records

    def with_reduced(self, record: PassRecord) -> PassRecord:
        """Return a record with that of a pass that does the same on smaller inputs, if one saves time."""
        if any(record.decided):  # values have to be those of the example
            return record
        found: list[PassRecord] = []

        def runs_alike(probe: Probe) -> bool:
            if [record, *found][-1].elements < _FEW_ELEMENTS:
                return False
            small = self.record_if_runs(probe)
            if small is None or not small.same_way(record):
                return False
            found.append(small)
            return True

        reduce_sizes(record.probe, runs_alike)
        return record._replace(small=found[-1]) if found else record


def trace_model(
    model: nn.Module, passes: Sequence[PassRecord], splits: Sequence[Split], deadline: Deadline | None = None
) -> list[TraceRecord]:
    """Return for each split the record of a trace of several passes.

    Splits that choose alike have one record. The passes run once for the first split, and once for all others
    that choose otherwise in it.

    Args:
        model: Is not changed.
        passes: The records of the passes. Multiply-adds are counted for the first one.
        splits: As for :class:`TraceRecord`.
        deadline: When to stop; ``None`` for no limit.
    """
    found: dict[Split, TraceRecord] = {}

    def follow(chosen: Sequence[Split]) -> None:
        trace = Trace(open_norms_(copy_sharing_weights(model)), chosen, deadline)
        for number, each in enumerate(passes):
            count_pass()
            trace.follow(each, count=number == 0)
        found.update(zip(chosen, trace.records, strict=True))

    follow(splits[:1])
    while left := [split for split in splits if not any(each.same_with(split) for each in found.values())]:
        # what chooses otherwise in the first trace may not do so in another one
        follow(list({found[splits[0]].choices(split): split for split in reversed(left)}.values()))
    return [next(each for each in found.values() if each.same_with(split)) for split in splits]
