"""The design of a measurement: few networks, among which each pair of widths of two groups occurs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from typing import TypeAlias

from lightning_prune.units.groups import UnitGroup

Axis: TypeAlias = tuple[tuple[str, float], ...]  # as in LayerTimes, sorted


def widths_of(group: UnitGroup, levels: int) -> list[int]:
    """Return the widths of a group at each level: from the least that it may keep, at least 2, to all.

    With a single channel PyTorch lays out tensors otherwise, and a network may fail. The last but one of more
    than three is the next below all: a whole layer may run in another way than any smaller one.
    """
    least = min(group.size, max(2, group.least))
    steps = levels - 1 if levels > 3 else levels
    widths = [group.width(round(least + (group.size - least) * step / (steps - 1))) for step in range(steps)]
    below = max((width for width in range(least, group.size) if group.allows(width)), default=group.size)
    return sorted([*widths, *[below] * (levels - steps)])


def level_of(run: int, colour: int, levels: int) -> int:
    """Return at which level the groups of a colour are in a run, out of ``levels ** 2`` runs.

    In these runs each pair of levels of two colours occurs once: an orthogonal array of strength 2 (Rao 1947),
    by lines over a field. Run 0 has all groups at level 0.

    Args:
        run: Number of the run.
        colour: Number of the colour, at most ``levels``.
        levels: The number of levels, a prime.

    >>> runs = [[level_of(run, colour, 3) for colour in range(4)] for run in range(9)]
    >>> runs[0], runs[-1], len({tuple(run[2:]) for run in runs})
    ([0, 0, 0, 0], [2, 1, 0, 2], 9)
    """
    first, second = divmod(run, levels)
    return second if colour == levels else (first + colour * second) % levels


def colours_of(layers: Iterable[Sequence[Axis]], groups: Collection[str], levels: int) -> dict[str, int]:
    """Return a colour for each group, so that groups of one axis have the same, and those of two axes others.

    Where that is not possible, two axes of a layer have the same colour.

    Args:
        layers: The axes of each layer.
        groups: The names of all groups.
        levels: The number of levels; there is one colour more.
    """
    root = {name: name for name in groups}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    pairs = [axes for axes in layers if len(axes) == 2]
    for axes in pairs:
        for axis in axes:
            for name, _ in axis[1:]:
                root[find(name)] = find(axis[0][0])
    near: dict[str, set[str]] = {find(name): set() for name in groups}
    for axes in pairs:
        for one, other in combinations([find(axis[0][0]) for axis in axes], 2):
            near[one] |= {other} - {one}
            near[other] |= {one} - {other}
    colour: dict[str, int] = {}
    for name in sorted(near, key=lambda each: -len(near[each])):
        taken = {colour[other] for other in near[name] if other in colour}
        colour[name] = next((each for each in range(levels + 1) if each not in taken), 0)
    return {name: colour[find(name)] for name in groups}
