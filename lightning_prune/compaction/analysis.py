"""What can be cut out of a model: what the graph couples, and a trial has shown to come out the same."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.compaction.sizes import adjustments
from lightning_prune.compaction.trial import Trial, uneven
from lightning_prune.graph import Split, Trace, budgets, find_groups, first, heads, last, unique_names
from lightning_prune.probe import Probe, evaluating
from lightning_prune.units import UnitGroup, Units

# how to split dimensions, and whether to adjust numbers, in the order in which it is tried
_WAYS = [(heads, False), (first, False), (last, True), (heads, True), (first, True)]


def analyse(model: nn.Module, probe: Probe) -> Units:
    """The unit groups of a model, each cut on trial, and what is frozen, with the reason.

    Where a dimension becomes several, as channels do in attention heads, the graph cannot tell which of them
    may shrink, nor which whole numbers a module keeps of its sizes. What fails as it is is tried with the other
    dimensions, and with such numbers adjusted.

    Args:
        model: Stays as it is.
        probe: Runs it.

    Raises:
        ValueError: If the model rejects the example, or gives something else each time.
    """
    trial = Trial(model, probe, ahead=True)
    main, unseen = _traced(model, probe, last)
    found = find_groups(model, main)
    good, failing = _try(trial, found.groups)
    traces, passed = {last: main}, [(group, 0) for group in good]
    stuck = [group for group in found.groups if group.name in failing]
    for split, adjusted in _WAYS:
        if not stuck:
            break
        if split not in traces:
            traces[split] = _traced(model, probe, split)[0]
        others = _freeing(find_groups(model, traces[split]).groups, stuck, [group for group, _ in passed])
        good = _adjusted(trial, model, others) if adjusted else _try(trial, others)[0]
        passed += [(group, list(traces).index(split)) for group in good]
        freed = {place for group in good for place in _made(group)}
        stuck = [group for group in stuck if not _made(group) & freed]
    frozen = {**found.frozen, **unseen, **{group.name: failing[group.name] for group in stuck}}
    named = unique_names(group for group, _ in passed)
    owners = [(group, number) for group, (_, number) in zip(named, passed, strict=True)]
    units = Units(named, frozen, budgets(model, list(traces.values()), owners))
    return units.without(trial.failing(uneven(named)))


def _try(trial: Trial, groups: Sequence[UnitGroup]) -> tuple[list[UnitGroup], dict[str, str]]:
    """Those that can be cut, and name to reason for the others.

    Of groups that look alike, as in the blocks of a transformer, the first and the last are tried at first;
    where both fail, so would the rest.
    """
    kin: dict[object, list[UnitGroup]] = defaultdict(list)
    for group in groups:
        leaves = tuple(part.name.rpartition(".")[2] for part in group.masked)
        kin[leaves, group.size, tuple(key for _, key in group.attributes)].append(group)
    ends = {group.name: group for alike in kin.values() for group in (alike[0], alike[-1])}
    failing = trial.failing(uneven(list(ends.values())), rough=True)
    rest = []
    for alike in kin.values():
        if alike[0].name in failing and alike[-1].name in failing:
            failing |= {group.name: failing[alike[0].name] for group in alike}
        else:
            rest += [group for group in alike if group.name not in ends]
    failing |= trial.failing(uneven(rest), rough=True)
    return [group for group in groups if group.name not in failing], failing


def _freeing(
    groups: Iterable[UnitGroup], stuck: Iterable[UnitGroup], passed: Iterable[UnitGroup]
) -> list[UnitGroup]:
    """Groups of another trace that have weights of the stuck ones, and none of those that have passed."""
    wanted = {place for group in stuck for place in _made(group)}
    taken = {place for group in passed for place in _made(group)}
    return [group for group in groups if _made(group) & wanted and not _made(group) & taken]


def _adjusted(trial: Trial, model: nn.Module, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
    """Those that can be cut once whole numbers of their modules are adjusted."""
    left = {group.name: (group, adjustments(model, group)) for group in groups}
    good: list[UnitGroup] = []
    for turn in range(max((len(ways) for _, ways in left.values()), default=0)):
        now = [replace(group, attributes=ways[turn]) for group, ways in left.values() if turn < len(ways)]
        good += _try(trial, now)[0]
        for group in good:
            left.pop(group.name, None)
    return good


def _made(group: UnitGroup) -> set[tuple[str, int | None, int]]:
    """The places of the weights that make it."""
    found = set()
    for part in group.slices:
        assert part.index is not None
        found |= {(part.name, part.dim, place) for place in (part.index >= 0).nonzero().flatten().tolist()}
    return found


def macs_by_weight(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Multiply-adds of one pass by name of the parameter that they read; "" is what reads none, or several."""
    trace, _ = _traced(model, probe, last)
    amounts = {"": 0}
    for amount, _, names in trace.terms:
        name = next(iter(names)) if len(names) == 1 else ""
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def _traced(model: nn.Module, probe: Probe, split: Split) -> tuple[Trace, dict[str, str]]:
    """A trace in evaluation mode and, for what has no part in that, in training mode: auxiliary heads.

    Returns:
        The trace, and name to reason of matrices that it has not seen.
    """
    twin = copy.deepcopy(model)
    trace = Trace(twin, split)
    why = "took no part in the forward pass"
    with evaluating(twin):
        trace.follow(partial(probe, twin), count=True)
        for other in probe.others:
            trace.follow(partial(other, twin))
        if not trace.seen.issuperset(name for name, _ in twin.named_parameters()):
            _train(twin)
            try:
                for each in (probe, *probe.others):
                    trace.follow(partial(each, twin))
            except Exception as error:  # a user's forward may raise anything
                why += f", which fails in training mode with {error!r}"
    matrices = [name for name, parameter in twin.named_parameters() if parameter.ndim > 1]
    return trace, {name: why for name in matrices if name not in trace.seen}


def _train(model: nn.Module) -> None:
    """Training mode, but for norms: those want more than one value to take statistics of."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
