"""What can be cut out of a model: what the graph couples, and a trial has shown to come out the same."""

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
from lightning_prune.units.groups import Units

# how to split dimensions, and whether to adjust numbers, in the order in which it is tried
_HEADS = (head_dim, split_head_dim)
_ATTEMPTS = [
    *((split, adjusted) for split in _HEADS for adjusted in (False, True)),
    *((split, adjusted) for adjusted in (False, True) for split in (last_dim, first_dim)),
]


def analyse(model: nn.Module, probe: Probe, max_seconds: float = math.inf) -> Units:
    """The unit groups of a model in its order, each cut on trial, and what is frozen, with the reason.

    Where a dimension becomes several, as channels do in attention heads, the graph cannot tell which of them
    may shrink, nor which whole numbers a module keeps of its sizes. Whole heads are tried first, then what lies
    within, then whole groups; what fails is tried with such numbers adjusted.

    Args:
        model: Stays as it is.
        probe: Runs it.
        max_seconds: How long it may take.

    Raises:
        ValueError: If the model rejects the example, gives something else each time, or runs other ops when
            its weights change, or if it takes too long.
    """
    deadline = Deadline(max_seconds)
    search = GroupSearch(model, trial := CutTrial(model, probe, ahead=True, deadline=deadline))
    check_same_ops(model, probe)
    main, unseen = trace_model(model, probe, last_dim, deadline)
    traces, found = {last_dim: main}, {last_dim: find_groups(model, main)}
    views: list[int] = []  # the trace that each group of the search was found in
    of_heads: dict[str, str] = {}
    # where no dimension was split_used, the graph is the same whatever the split
    for split, adjusted in _ATTEMPTS if main.split_used else [way for way in _ATTEMPTS if way[0] is last_dim]:
        if split not in traces:
            traces[split] = trace_model(model, probe, split, deadline)[0]
            found[split] = find_groups(model, traces[split])
        whole = split in _HEADS
        groups = (group for group in found[split].groups if group.heads or not whole)
        failing = search.attempt(groups, adjusted=adjusted)
        of_heads |= failing if whole else {}
        views += [list(traces).index(split)] * (len(search.passed) - len(views))
    made = {part.name for group in search.passed for part in group.slices}
    frozen = {name: of_heads.get(name, why) for name, why in (found[last_dim].frozen | unseen).items()}
    frozen = {name: why for name, why in frozen.items() if name not in made}
    frozen |= {group.name: search.reason(group) for group in search.apart(found[last_dim].groups)}
    order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    passed = sorted(zip(search.passed, views, strict=True), key=lambda found: order[found[0].slices[0].name])
    named = unique_names(group for group, _ in passed)
    owners = [(group, view) for group, (_, view) in zip(named, passed, strict=True)]
    units = Units(named, frozen, budgets(model, list(traces.values()), owners))
    trial.sharpen()
    return units.without(trial.failing(uneven_cut(named)))
