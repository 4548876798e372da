"""What can be cut out of a model: what the graph couples, and a trial has shown to come out the same."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.compaction.sizes import adjustments
from lightning_prune.compaction.trial import Trial, stir_, uneven
from lightning_prune.graph import (
    Split,
    Tape,
    Trace,
    budgets,
    find_groups,
    first,
    heads,
    last,
    split_heads,
    unique_names,
)
from lightning_prune.probe import Deadline, Probe, evaluating, plain_attention
from lightning_prune.units import UnitGroup, Units

_Cuts: TypeAlias = frozenset[tuple[str, int | None, tuple[int, ...]]]

# how to split dimensions, and whether to adjust numbers, in the order in which it is tried
_HEADS = (heads, split_heads)
_WAYS = [
    *((split, adjusted) for split in _HEADS for adjusted in (False, True)),
    *((split, adjusted) for adjusted in (False, True) for split in (last, first)),
]


def analyse(model: nn.Module, probe: Probe, max_seconds: float = math.inf) -> Units:
    """The unit groups of a model, each cut on trial, and what is frozen, with the reason.

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
    trial = Trial(model, probe, ahead=True, deadline=deadline)
    _check_way(model, probe)
    main, unseen = _traced(model, probe, last, deadline)
    traces, found = {last: main}, {last: find_groups(model, main)}
    passed: list[tuple[UnitGroup, int]] = []
    tried = set()
    reasons: dict[_Cuts, str] = {}
    of_heads: dict[str, str] = {}
    for split, adjusted in _WAYS:
        if split is not last and not main.divided:
            continue  # the graph is the same either way
        if split not in traces:
            traces[split] = _traced(model, probe, split, deadline)[0]
            found[split] = find_groups(model, traces[split])
        groups = _apart(found[split].groups, [group for group, _ in passed])
        groups = [group for group in groups if group.heads or split not in _HEADS]
        groups = [group for group in groups if (_cuts(group), adjusted) not in tried]
        tried |= {(_cuts(group), adjusted) for group in groups}
        good, bad = (_adjusted(trial, model, groups), {}) if adjusted else _try(trial, groups)
        failing = [group for group in groups if group.name in bad]
        reasons |= {_cuts(group): bad[group.name] for group in failing}
        of_heads |= {group.slices[0].name: bad[group.name] for group in failing if split in _HEADS}
        passed += [(group, list(traces).index(split)) for group in good]
    stuck = _apart(found[last].groups, [group for group, _ in passed])
    made = {part.name for group, _ in passed for part in group.slices}
    frozen = {name: of_heads.get(name, why) for name, why in found[last].frozen.items() if name not in made}
    frozen |= unseen | {group.name: reasons[_cuts(group)] for group in stuck}
    named = unique_names(group for group, _ in passed)
    owners = [(group, number) for group, (_, number) in zip(named, passed, strict=True)]
    units = Units(named, frozen, budgets(model, list(traces.values()), owners))
    trial.sharpen()
    return units.without(trial.failing(uneven(named)))


def _check_way(model: nn.Module, probe: Probe) -> None:
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    stir_(after)
    ways = []
    for each in (before, after):
        with evaluating(each), plain_attention(), Tape() as tape:
            probe(each)
        ways.append(tape.steps)
    if ways[0] != ways[1]:
        raise ValueError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            " a little: channels cannot be followed through it. Unstructured prunes it."
        )


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
    failing = trial.failing(uneven(list(ends.values())))
    rest = []
    for alike in kin.values():
        if alike[0].name in failing and alike[-1].name in failing:
            failing |= {group.name: failing[alike[0].name] for group in alike}
        else:
            rest += [group for group in alike if group.name not in ends]
    failing |= trial.failing(uneven(rest))
    return [group for group in groups if group.name not in failing], failing


def _apart(groups: Iterable[UnitGroup], passed: Iterable[UnitGroup]) -> list[UnitGroup]:
    """Groups that have no weight in common with those that have passed."""
    taken = {place for group in passed for place in _made(group)}
    return [group for group in groups if not _made(group) & taken]


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


def _cuts(group: UnitGroup) -> _Cuts:
    """All that goes along with its units, to tell whether another group is the same."""
    found = set()
    for part in (*group.masked, *group.buffers):
        assert part.index is not None
        found.add((part.name, part.dim, tuple(part.index.tolist())))
    return frozenset(found)


def macs_by_weight(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Multiply-adds of one pass by name of the parameter that they read; "" is what reads none, or several."""
    trace, _ = _traced(model, probe, last)
    amounts = {"": 0}
    for amount, _, names in trace.terms:
        name = next(iter(names)) if len(names) == 1 else ""
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def _traced(
    model: nn.Module, probe: Probe, split: Split, deadline: Deadline | None = None
) -> tuple[Trace, dict[str, str]]:
    """A trace in evaluation mode and, for what has no part in that, in training mode: auxiliary heads.

    Returns:
        The trace, and name to reason of matrices that it has not seen.
    """
    copied = copy.deepcopy(model)
    trace = Trace(copied, split, deadline)
    why = "took no part in the forward pass"
    with evaluating(copied):
        trace.follow(copied, probe, count=True)
        for other in probe.others:
            trace.follow(copied, other)
        if not trace.seen.issuperset(name for name, _ in copied.named_parameters()):
            _train(copied)
            try:
                for each in (probe, *probe.others):
                    trace.follow(copied, each)
            except Exception as error:  # a user's forward may raise anything
                why += f", which fails in training mode with {error!r}"
    matrices = [name for name, parameter in copied.named_parameters() if parameter.ndim > 1]
    return trace, {name: why for name in matrices if name not in trace.seen}


def _train(model: nn.Module) -> None:
    """Training mode, but for norms: those want more than one value to take statistics of."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
