"""Groups that are taken to be alike, as those of a transformer's blocks: a few of them are tried for all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from torch import nn

from lightning_prune.channels.compaction.failures import Failure
from lightning_prune.units.groups import UnitGroup


def plain_kind(module: nn.Module) -> object:
    """Return the class of a module, with its attributes that are truth values or texts."""
    own = {key: value for key, value in vars(module).items() if isinstance(value, bool | str)}
    return type(module), tuple(sorted(own.items()))


def samples(kinds: Iterable[Sequence[UnitGroup]]) -> list[UnitGroup]:
    """Return the first, the middle and the last group of each kind."""
    found = (group for kind in kinds for group in (kind[0], kind[len(kind) // 2], kind[-1]))
    return list(dict.fromkeys(found))


def with_alike(kinds: Iterable[Sequence[UnitGroup]], failing: Mapping[str, Failure]) -> dict[str, Failure]:
    """Return which groups fail; if all samples of a kind do so, the others are taken to fail as the first does.

    Args:
        kinds: The groups.
        failing: The failures of samples.
    """
    found = dict(failing)
    for kind in kinds:
        if all(group.name in failing for group in samples([kind])):
            first = kind[0].name
            alike = failing[first].inferred(first)
            found |= {group.name: alike for group in kind if group.name not in failing}
    return found


def others(groups: Iterable[UnitGroup], failing: Container[str]) -> list[UnitGroup]:
    """Return the groups that do not fail."""
    return [group for group in groups if group.name not in failing]
