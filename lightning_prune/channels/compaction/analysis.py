"""Analysis of a model: which unit groups can be cut, as the trace finds them and trial cuts confirm."""

from __future__ import annotations

import math

from torch import nn

from lightning_prune.channels.compaction.cut_trial import CutTrial, uneven_cut
from lightning_prune.channels.compaction.group_search import GroupSearch
from lightning_prune.channels.compaction.tracing import check_same_ops, trace_model
from lightning_prune.channels.graph.costs import budgets
from lightning_prune.channels.graph.groups import find_groups, unique_names
from lightning_prune.channels.graph.trace import first_dim, head_dim, last_dim, split_head_dim
from lightning_prune.core.probes import Deadline, Probe
from lightning_prune.units.groups import UnitGroup, Units

# pairs of how a trace splits dimensions and whether integer attributes are adjusted, in the order of the trials
_HEADS = (head_dim, split_head_dim)
_ATTEMPTS = [
    *((split, adjusted) for split in _HEADS for adjusted in (False, True)),
    *((split, adjusted) for adjusted in (False, True) for split in (last_dim, first_dim)),
]


def analyse(model: nn.Module, probe: Probe, max_seconds: float = math.inf) -> Units:
    """Return the unit groups of a model, in the order of its parameters, and what is frozen, with the reason.

    Each group has passed a trial: a copy with some units cut gives the same outputs as one with them masked.

    Where an op splits a dimension into several, as a view splits channels into heads and head size, the trace
    cannot tell which of these may shrink, nor which integer attributes of a module hold their sizes. Whole
    attention heads are tried first, then the last of the dimensions (channels within heads or groups), then the
    first one (whole groups). Groups that fail are tried again with integer attributes adjusted.

    Args:
        model: Is not changed.
        probe: Runs the model.
        max_seconds: Time limit of the analysis, in seconds.

    Raises:
        ValueError: If the model cannot run on the example, gives different outputs for it each time, or runs
            other ops when its weights change, or if the time limit is exceeded.
    """
    deadline = Deadline(max_seconds)
    search = GroupSearch(model, trial := CutTrial(model, probe, masked=False, deadline=deadline))
    check_same_ops(model, probe)
    main, unseen = trace_model(model, probe, last_dim, deadline)
    traces, found = {last_dim: main}, {last_dim: find_groups(model, main)}
    # the groups that passed, each with the number of the trace that found it
    owners: list[tuple[UnitGroup, int]] = []
    head_reasons: dict[str, str] = {}
    # if the trace had no dimension to split, the traces of all splits are the same
    for split, adjusted in _ATTEMPTS if main.split_used else [(last_dim, False), (last_dim, True)]:
        if split not in traces:
            traces[split] = trace_model(model, probe, split, deadline)[0]
            found[split] = find_groups(model, traces[split])
        heads_only = split in _HEADS
        groups = (group for group in found[split].groups if group.heads or not heads_only)
        passed, failing = search.attempt(groups, adjusted=adjusted)
        owners += [(group, list(traces).index(split)) for group in passed]
        head_reasons |= failing if heads_only else {}
    made = {part.name for group in search.passed for part in group.slices}
    reasons = (found[last_dim].frozen | unseen).items()
    frozen = {name: head_reasons.get(name, reason) for name, reason in reasons if name not in made}
    frozen |= {group.name: search.reason(group) for group in search.apart(found[last_dim].groups)}
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    owners.sort(key=lambda owner: order[owner[0].slices[0].name])
    named = unique_names(group for group, _ in owners)
    owners = [(group, number) for group, (_, number) in zip(named, owners, strict=True)]
    units = Units(named, frozen, budgets(model, list(traces.values()), owners))
    trial.use_double_precision()
    return units.without(trial.failing(uneven_cut(named)))
