"""Analysis of a model: which unit groups can be cut, as the trace finds them and trial cuts confirm."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.group_search import GroupSearch
from lightning_prune.channels.compaction.known_analyses import Analysis, find_analysis, keep_analysis
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.compaction.tracing import check_same_ops, record_passes, trace_model
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.compaction.unseen import UnseenModules
from lightning_prune.channels.graph.costs import budgets
from lightning_prune.channels.graph.groups import find_groups
from lightning_prune.channels.graph.splits import FIRST_DIM, HEAD_DIM, LAST_DIM, SPLIT_HEAD_DIM, Split
from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.core.averages import average_reasons, averaged_names
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, Probe
from lightning_prune.core.tensors import no_number
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import axis_slices

# pairs of how a trace splits dimensions and whether integer attributes are adjusted, in the order of the trials
_HEADS = (HEAD_DIM, SPLIT_HEAD_DIM)
_ATTEMPTS = [
    *((split, adjusted) for split in _HEADS for adjusted in (False, True)),
    *((split, adjusted) for adjusted in (False, True) for split in (LAST_DIM, FIRST_DIM)),
]


def analyse(model: nn.Module, probe: Probe, max_seconds: float = math.inf) -> Analysis:
    """Return the unit groups of a model, and what is frozen, with the passes that have shown it.

    An analysis of the same module on the same example is made once.

    Args:
        model: Is not changed.
        probe: Runs the model.
        max_seconds: Time limit of the analysis, in seconds.

    Raises:
        ValueError: If the model cannot run on the example, gives different outputs for it each time, or runs
            other ops when its weights change, or if the time limit is exceeded.
    """
    known = find_analysis(model, probe)
    if known is None:
        known = _analyse(model, probe, Deadline(max_seconds))
        keep_analysis(model, probe, known)
    return known


def _analyse(model: nn.Module, probe: Probe, deadline: Deadline) -> Analysis:
    """Return the unit groups of a model, in the order of its parameters, and what is frozen, with the reason.

    Each group has passed a trial: a copy with some units cut gives the same outputs as one with them masked, in
    all passes of the probe, in training mode too, and for other inputs. Units that weights which no pass runs
    may read are frozen.

    Where an op splits a dimension into several, as a view splits channels into heads and head size, the trace
    cannot tell which of these may shrink, nor which integer attributes of a module hold their sizes. Whole
    attention heads are tried first, then the last of the dimensions (channels within heads or groups), then the
    first one (whole groups). Groups that fail are tried again with integer attributes adjusted.

    Args:
        model: Is not changed.
        probe: Runs the model.
        deadline: The time limit of the analysis.

    Raises:
        ValueError: If the model cannot run on the example, gives different outputs for it each time, or runs
            other ops when its weights change, or if the time limit is exceeded.
    """
    passes = record_passes(model, probe)
    perturb_(perturbed := copy_model(model))
    check_same_ops(model, perturbed, passes[0])
    trial = CutTrial(model, list(map(TrialPass.of, passes)), perturbed=perturbed, deadline=deadline)
    search = GroupSearch(model, trial)
    traces: dict[Split, TraceRecord] = {}
    found: dict[Split, Units] = {}

    def follow(split: Split) -> None:
        if split not in traces:
            traces[split] = trace_model(model, passes, split, deadline)
            found[split] = find_groups(model, traces[split])

    follow(LAST_DIM)
    main = traces[LAST_DIM]
    head_reasons: dict[str, str] = {}
    unseen = UnseenModules(model, main.ran, passes)
    averages, follows = averaged_names(model), average_reasons(model)

    def why_not(group: UnitGroup) -> str | None:
        """Return the reason to keep a group without a trial; ``None`` if there is none."""
        return _average_alone(group, averages, follows) or unseen.reader_of(group)

    # if the trace had no dimension to split, the traces of all splits are the same
    for split, adjusted in _ATTEMPTS if main.split_used else [(LAST_DIM, False), (LAST_DIM, True)]:
        follow(split)
        heads_only = split.heads
        groups = (
            group for group in found[split].groups if (group.heads or not heads_only) and why_not(group) is None
        )
        failing = search.attempt(groups, list(traces).index(split), adjusted=adjusted)
        head_reasons |= failing if heads_only else {}
    search.limit()
    trial.refine()
    search.confirm()
    made = {part.name for group, _ in search.passed for part in group.slices}
    reasons = {**found[LAST_DIM].frozen, **_not_followed(model, main, follows)}.items()
    frozen = {name: head_reasons.get(name, reason) for name, reason in reasons if name not in made}
    covered = {part.name for group, _ in search.passed for part in group.masked}
    for group in search.apart(found[LAST_DIM].groups):
        why = why_not(group) or search.reason(group)
        whole = {part.name for part in group.masked if part.weight.ndim > 1} - covered - frozen.keys()
        frozen |= dict.fromkeys(sorted(whole), why)
        frozen[group.name] = why
    costs = budgets(model, list(traces.values()), search.passed)
    written = frozenset[str]().union(*(each.written for each in passes))
    units = Units(tuple(group for group, _ in search.passed), frozen, costs, written)
    return Analysis(units, tuple(trial.passes))


def _average_alone(group: UnitGroup, averages: Mapping[str, str], reasons: Mapping[str, str]) -> str | None:
    """Return a reason if a group cuts an average otherwise than what it averages, and ``None`` if not.

    Args:
        group: The group.
        averages: As :func:`averaged_names` returns it.
        reasons: As :func:`average_reasons` returns it.
    """
    cuts = {(part.name, part.dim): part.index for part in axis_slices((*group.masked, *group.buffers))}
    for (name, dim), index in cuts.items():
        if name not in averages:
            continue
        other = cuts.get((averages[name], dim))
        if index is None or other is None or not torch.equal(index, other):
            if all(part.name in averages for part in group.slices):
                return reasons[group.slices[0].name]
            return f"is coupled with {name}, an average of {averages[name]} that cannot follow it"
    return None


def _not_followed(model: nn.Module, trace: TraceRecord, averages: Mapping[str, str]) -> dict[str, str]:
    """Return the matrices that no result depends on, and those that hold no plain numbers, with reasons."""
    reasons = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name not in trace.used:
            reasons[name] = averages.get(name, "took no part in the forward pass")
        elif parameter.ndim > 1 and parameter.is_complex():
            reasons[name] = "holds complex numbers, which are not followed"
        elif parameter.ndim > 1 and (why := no_number(parameter)) is not None:
            reasons[name] = why
    return reasons
