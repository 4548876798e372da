"""Integer attributes of user-defined modules that may hold a size: number of heads, head size, inner width."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import combinations, islice
from typing import TypeAlias

from torch import nn

from lightning_prune.channels.compaction.module_widths import has_widths
from lightning_prune.channels.compaction.whole_numbers import configured_numbers, whole_numbers
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import Slice, axis_slices

Attribute: TypeAlias = tuple[str, str]  # names of a module and of a whole number that it keeps
_Numbers: TypeAlias = Callable[[nn.Module], Mapping[str, int]]

_MOST_CHOICES = 48


def size_attributes(model: nn.Module, group: UnitGroup) -> list[Attribute]:
    """Return the integer attributes that may hold a size of a group, since their values look like one.

    Their values are above 1 and equal to the group's number of units, to the number of places that its units
    take up along a dimension of a weight, or to a half or a third of the latter. They belong to modules of
    unknown kinds that hold the weights which make or read the units, split these from others or apply filters
    to them that are no parameters, or to modules one or two levels above those that hold weights which make
    them.

    Args:
        model: The model.
        group: A unit group of the model.

    Returns:
        The attributes, the likeliest first: those of near modules, and those equal to the number of units.
    """
    counts = _counts(group.slices)
    # a projection may compute keys and values, or queries, keys and values, at once
    shares = {count // share for count in counts for share in (2, 3)}
    return _equal_to(model, group, ({group.size}, counts, shares, group.partly_filled))


def attribute_choices(model: nn.Module, group: UnitGroup) -> list[tuple[Attribute, ...]]:
    """Return the sets of attributes to shrink with a group, in the order of their trials: single ones first.

    A number that the network does not depend on is therefore left alone. Those of one name in all modules, such
    as the blocks of a stage, follow, then other sets, small ones first. Of many only the first are tried. For
    heads, sets with their number in a configuration follow, then those with other parts of a width: the number
    of queries, or their size, where several share a key.
    """
    own = size_attributes(model, group)
    likely = _sets(own)
    if not group.heads:
        return likely
    # several heads may share a key, and what reads them has the places of their queries alone
    numbers = {part for part in _divisors(_counts(group.masked)) if part % group.size == 0}
    configured = _equal_to(model, group, ({group.size}, numbers), configured_numbers)
    # items of lists are windows and shifts rather than parts of a width
    parts = _equal_to(model, group, (_divisors(_counts(group.slices)),))
    every = [each for each in parts if "[" not in each[1]]
    sets = [*likely, *(_sets([*own, *configured]) if configured else ()), *_sets(every)]
    return list(dict.fromkeys(sets))


def _counts(slices: Iterable[Slice]) -> set[int]:
    """Return the numbers of places that units take up along dimensions of weights."""
    return {int((part.index >= 0).sum()) for part in axis_slices(slices) if part.index is not None}


def _divisors(counts: Iterable[int]) -> set[int]:
    """Return the divisors of these numbers, without 1 and the numbers themselves."""
    return {part for count in counts for part in range(2, count) if count % part == 0}


def _equal_to(
    model: nn.Module, group: UnitGroup, values: Iterable[Container[int]], numbers: _Numbers = whole_numbers
) -> list[Attribute]:
    """Return the numbers of modules with one of these values, of near modules first, then the first values."""
    makers, holders = (
        [part.name.rpartition(".")[0] for part in parts] for parts in (group.slices, group.masked)
    )
    parents = list(dict.fromkeys(maker.rpartition(".")[0] for maker in makers))
    unknown, readers = (
        [name for name in names if not has_widths(model.get_submodule(name))] for names in (makers, holders)
    )
    above = [name.rpartition(".")[0] for name in parents]
    levels = ([*unknown, *parents, *group.sized_in], above, readers)
    wanted = list(values)
    found = [
        (name, key)
        for level in levels
        for each in wanted
        for name in dict.fromkeys(level)
        for key, value in numbers(model.get_submodule(name)).items()
        if value in each and value > 1
    ]
    return list(dict.fromkeys(found))


def _sets(found: Sequence[Attribute]) -> list[tuple[Attribute, ...]]:
    """Return the sets of attributes, small ones first, and no more of them than are tried."""
    single = [(each,) for each in found[:_MOST_CHOICES]]
    names = dict.fromkeys(key.partition("[")[0] for _, key in found)
    alike = (tuple(each for each in found if each[1].partition("[")[0] == name) for name in names)
    several = (chosen for size in range(2, len(found) + 1) for chosen in combinations(found, size))
    return list(dict.fromkeys([*single, *alike, *islice(several, max(0, _MOST_CHOICES - len(single)))]))
