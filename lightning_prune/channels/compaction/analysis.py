"""Analysis of a model: which unit groups can be cut, as the trace finds them and trial cuts confirm."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.group_search import GroupSearch
from lightning_prune.channels.compaction.known_analyses import Analysis, find_analysis, keep_analysis
from lightning_prune.channels.compaction.parts import Followed, find_parts
from lightning_prune.channels.compaction.perturbation import perturb_
from lightning_prune.channels.compaction.tracing import check_same_ops, record_passes, trace_model
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.channels.compaction.unseen import UnseenModules
from lightning_prune.channels.graph.costs import budgets
from lightning_prune.channels.graph.groups import axis_reasons, find_groups
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.channels.graph.recorder import PassRecord
from lightning_prune.channels.graph.splits import FIRST_DIM, HEAD_DIM, LAST_DIM, SPLIT_HEAD_DIM, ZEROS_FOLLOW
from lightning_prune.channels.graph.trace_record import TraceRecord
from lightning_prune.core.averages import average_reasons, averaged_names
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, NotFollowedError, Probe
from lightning_prune.core.progress import pass_counter
from lightning_prune.core.tensors import no_number
from lightning_prune.units.budgets import Budget
from lightning_prune.units.groups import UnitGroup, Units
from lightning_prune.units.slices import axis_slices

# how traces split dimensions; pairs of this and whether integer attributes are adjusted, in the order of trials
_SPLITS = (LAST_DIM, HEAD_DIM, SPLIT_HEAD_DIM, FIRST_DIM, ZEROS_FOLLOW)
_ATTEMPTS = [
    *((split, adjusted) for split in (HEAD_DIM, SPLIT_HEAD_DIM) for adjusted in (False, True)),
    *((split, adjusted) for adjusted in (False, True) for split in (LAST_DIM, FIRST_DIM, ZEROS_FOLLOW)),
]
_PLAIN_ATTEMPTS = [(LAST_DIM, False), (LAST_DIM, True)]  # where all splits choose alike


@pass_counter("Find channels")
def analyse(
    model: nn.Module, probe: Probe, max_seconds: float = math.inf, named: Collection[str] = ()
) -> Analysis:
    """Return the unit groups of a model, in the order of its parameters, and what is frozen, with the reason.

    Each group has passed a trial: a copy with some units cut gives the same outputs as one with them masked, in
    all passes of the probe, in training mode too, and for other inputs. Units that weights which no pass runs
    may read are frozen.

    Where an op splits a dimension into several, as a view splits channels into heads and head size, the trace
    cannot tell which of these may shrink, nor which integer attributes of a module hold their sizes. Whole
    attention heads are tried first, then the last of the dimensions (channels within heads or groups), then the
    first one (whole groups). Groups that fail are tried again with integer attributes adjusted.

    A model that cannot be followed as a whole is followed within the largest parts that can be and that hold
    named parameters, on the inputs that they get. Their outputs, and what the rest of the model reads of their
    parameters, stay.

    Args:
        model: Is not changed.
        probe: Runs the model.
        max_seconds: Time limit of the analysis, in seconds.
        named: Names of parameters.

    Raises:
        NotFollowedError: If the model, and each such part, cannot run on the example, gives different outputs
            for it each time, or runs other ops when its weights change.
        ValueError: If the time limit is exceeded.
    """
    if (known := find_analysis(model, probe)) is not None:
        return known
    deadline = Deadline(max_seconds)
    try:
        found = _analysed(model, Followed(probe), deadline)
    except NotFollowedError as error:
        if not named:
            raise
        followed = find_parts(model, probe, named, partial(_first_trial, model, deadline=deadline), error)
        found = _analysed(model, followed, deadline)
        return found._replace(units=_with_rest(found.units, model, probe))
    keep_analysis(model, probe, found)
    return found


def _with_rest(found: Units, model: nn.Module, probe: Probe) -> Units:
    """Return the units of parts of a model, with the multiply-adds of the rest in their budget, if known."""
    budgets = dict(found.budgets)
    macs = cast(Budget, budgets.pop("macs"))
    with suppress(Exception):  # ops of the rest may fail where they are watched
        whole = sum(macs_by_parameter(copy_model(model), probe).values())
        budgets["macs"] = macs.plus(max(0, whole - macs.total))
    return replace(found, budgets=budgets)


def _first_trial(model: nn.Module, probe: Probe, deadline: Deadline) -> tuple[list[PassRecord], CutTrial]:
    """Return the records of all passes, and a trial with them.

    Raises:
        NotFollowedError: If the model cannot be followed.
    """
    passes = record_passes(model, probe, deadline)
    perturb_(perturbed := copy_model(model))
    check_same_ops(model, perturbed, passes[0])
    given = [TrialPass.of(each) for each in passes]
    return passes, CutTrial(model, given, perturbed=perturbed, deadline=deadline)


def _analysed(model: nn.Module, followed: Followed, deadline: Deadline) -> Analysis:
    passes, trial = _first_trial(model, followed.probe, deadline)
    search = GroupSearch(model, trial)
    traces = trace_model(model, passes, _SPLITS, deadline)
    main = traces[0]
    attempts = _ATTEMPTS if main.choices(LAST_DIM) else _PLAIN_ATTEMPTS
    groups_of = {trace: find_groups(model, trace) for trace in dict.fromkeys(traces)}
    found = [groups_of[trace] for trace in traces]
    head_reasons: dict[str, str] = {}
    for split, trace in zip(_SPLITS, traces, strict=True):
        head_reasons |= trace.frozen_heads() if split.heads else {}
    unseen = UnseenModules(model, main.ran | followed.elsewhere, passes)
    averages, follows = averaged_names(model), average_reasons(model)

    def why_not(group: UnitGroup) -> str | None:
        """Return the reason to keep a group without a trial; ``None`` if there is none."""
        return _average_alone(group, averages, follows) or unseen.reader_of(group)

    for split, adjusted in attempts:
        number = _SPLITS.index(split)
        groups = (
            group
            for group in found[number].groups
            if (group.heads or not split.heads) and why_not(group) is None
        )
        failing = search.attempt(groups, number, adjusted=adjusted)
        head_reasons |= failing if split.heads else {}
    search.limit()
    trial.refine()
    search.confirm()
    made = {part.name for group, _ in search.passed for part in group.slices}
    reasons = {**found[0].frozen, **_not_followed(model, main, follows, followed)}.items()
    frozen = {name: head_reasons.get(name, reason) for name, reason in reasons if name not in made}
    covered = {part.name for group, _ in search.passed for part in group.masked}
    for group in search.apart(found[0].groups):
        why = why_not(group) or search.reason(group)
        whole = {part.name for part in group.masked if part.weight.ndim > 1} - covered - frozen.keys()
        frozen |= dict.fromkeys(sorted(whole), why)
        frozen[group.name] = why
    frozen = {**axis_reasons(main, covered), **frozen}
    costs = budgets(model, traces, search.passed)
    written = frozenset[str]().union(*(each.written for each in passes))
    passed = tuple(group for group, _ in search.passed)
    whole_heads = {part.name for group in passed if group.heads for part in group.slices}
    failed_heads = {name: why for name, why in head_reasons.items() if name not in whole_heads}
    units = Units(passed, frozen, costs, written, followed.parts, failed_heads)
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


def _not_followed(
    model: nn.Module, trace: TraceRecord, averages: Mapping[str, str], followed: Followed
) -> dict[str, str]:
    """Return the matrices that no result depends on, and those that hold no plain numbers, with reasons."""
    reasons = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and followed.outside(name):
            reasons[name] = (
                f"lies outside of what is followed alone ({', '.join(followed.parts)}): {followed.why}"
            )
        elif parameter.ndim > 1 and name in followed.elsewhere:
            reasons[name] = "is read by the rest of the model, which is not followed"
        elif parameter.ndim > 1 and name not in trace.used:
            reasons[name] = averages.get(name, "took no part in the forward pass")
        elif parameter.ndim > 1 and parameter.is_complex():
            reasons[name] = "holds complex numbers, which are not followed"
        elif parameter.ndim > 1 and (why := no_number(parameter)) is not None:
            reasons[name] = why
    return reasons
