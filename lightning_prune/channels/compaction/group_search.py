"""Which unit groups can be cut: trials of what several views of one model couple."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from lightning_prune.channels.compaction.cut_trial import CutTrial, uneven_cut
from lightning_prune.channels.compaction.size_attributes import attribute_choices
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import axis_slices

_CutPlaces: TypeAlias = frozenset[tuple[str, int, tuple[int, ...]]]


class GroupSearch:
    """Unit groups that can be cut, each weight in one of them at most.

    Args:
        model: Whose groups they are.
        trial: Shows which can be cut.

    Attributes:
        passed: Groups found so far.
    """

    def __init__(self, model: nn.Module, trial: CutTrial) -> None:
        self._model, self._trial = model, trial
        self.passed: list[UnitGroup] = []
        self._tried: set[tuple[_CutPlaces, bool]] = set()
        self._reasons: dict[_CutPlaces, str] = {}

    def attempt(self, groups: Iterable[UnitGroup], *, adjusted: bool) -> dict[str, str]:
        """Tries those that neither were tried before nor have a weight in common with what has passed.

        Args:
            groups: As one view of the model has them.
            adjusted: Whether whole numbers that the model keeps of its sizes are adjusted.

        Returns:
            For the tensors of those that failed, if nothing was adjusted, name to reason.
        """
        groups = [group for group in self.apart(groups) if (_cut_places(group), adjusted) not in self._tried]
        self._tried |= {(_cut_places(group), adjusted) for group in groups}
        if adjusted:
            self.passed += self._adjusted(groups)
            return {}
        good, bad = self._try(groups)
        self.passed += good
        failing = [group for group in groups if group.name in bad]
        self._reasons |= {_cut_places(group): bad[group.name] for group in failing}
        return {part.name: bad[group.name] for group in failing for part in group.slices}

    def apart(self, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
        """Groups that have no weight in common with what has passed."""
        taken = {place for group in self.passed for place in _output_places(group)}
        return [group for group in groups if not _output_places(group) & taken]

    def reason(self, group: UnitGroup) -> str:
        """Why a group that was tried cannot be cut as it is."""
        return self._reasons[_cut_places(group)]

    def _try(self, groups: Sequence[UnitGroup]) -> tuple[list[UnitGroup], dict[str, str]]:
        """Those that can be cut, and name to reason for the others.

        Of groups of the same layers in other blocks, as in a transformer, the first, the last and one between
        are tried at first; where all of them fail, so would the rest.
        """
        kin: dict[object, list[UnitGroup]] = defaultdict(list)
        for group in groups:
            layers = tuple(re.sub(r"\d+", "", part.name) for part in group.masked)
            kin[layers, tuple(key for _, key in group.attributes)].append(group)
        tried: dict[str, UnitGroup] = {}
        for alike in kin.values():
            tried |= {group.name: group for group in (alike[0], alike[len(alike) // 2], alike[-1])}
        failing = self._trial.failing(uneven_cut(list(tried.values())))
        rest = []
        for alike in kin.values():
            known = [group.name for group in alike if group.name in tried]
            if failing.keys() >= set(known):
                failing |= {group.name: failing[known[0]] for group in alike if group.name not in tried}
            else:
                rest += [group for group in alike if group.name not in tried]
        failing |= self._trial.failing(uneven_cut(rest))
        return [group for group in groups if group.name not in failing], failing

    def _adjusted(self, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
        """Those that can be cut once whole numbers of their modules are adjusted."""
        left = {group.name: (group, attribute_choices(self._model, group)) for group in groups}
        good: list[UnitGroup] = []
        for turn in range(max((len(ways) for _, ways in left.values()), default=0)):
            now = [replace(group, attributes=ways[turn]) for group, ways in left.values() if turn < len(ways)]
            good += self._try(now)[0]
            for group in good:
                left.pop(group.name, None)
        return good


def _output_places(group: UnitGroup) -> set[tuple[str, int, int]]:
    """The places of the weights that make it."""
    found = set()
    for part in axis_slices(group.slices):
        assert part.index is not None
        found |= {(part.name, part.dim, place) for place in (part.index >= 0).nonzero().flatten().tolist()}
    return found


def _cut_places(group: UnitGroup) -> _CutPlaces:
    """All that goes along with its units, to tell whether another group is the same."""
    found = set()
    for part in axis_slices((*group.masked, *group.buffers)):
        assert part.index is not None
        found.add((part.name, part.dim, tuple(part.index.tolist())))
    return frozenset(found)
