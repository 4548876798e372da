"""The search for unit groups that can be cut, among those that several traces of one model have found."""

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
    """Collects unit groups that can be cut, such that no two make their units from the same part of a weight.

    Args:
        model: The model that the groups belong to.
        trial: Tries the cuts.

    Attributes:
        passed: The groups that have passed their trial so far.
    """

    def __init__(self, model: nn.Module, trial: CutTrial) -> None:
        self._model, self._trial = model, trial
        self.passed: list[UnitGroup] = []
        self._tried: set[tuple[_CutPlaces, bool]] = set()
        self._reasons: dict[_CutPlaces, str] = {}

    def attempt(self, groups: Iterable[UnitGroup], *, adjusted: bool) -> tuple[list[UnitGroup], dict[str, str]]:
        """Try the groups that were not tried before and share no weights with those in ``passed``.

        Args:
            groups: The groups that one trace has found.
            adjusted: Whether integer attributes of modules that may hold the size of a group are adjusted.

        Returns:
            The groups that passed, and the names of the tensors that make the units of those that failed, with
            the reasons; no reasons are given if ``adjusted``.
        """
        groups = [group for group in self.apart(groups) if (_cut_places(group), adjusted) not in self._tried]
        self._tried |= {(_cut_places(group), adjusted) for group in groups}
        passed, reasons = (self._adjusted(groups), {}) if adjusted else self._try(groups)
        self.passed += passed
        failing = [group for group in groups if group.name in reasons]
        self._reasons |= {_cut_places(group): reasons[group.name] for group in failing}
        return passed, {part.name: reasons[group.name] for group in failing for part in group.slices}

    def apart(self, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
        """Return the groups whose units are made by other weights than those of the groups in ``passed``."""
        taken = {place for group in self.passed for place in _output_places(group)}
        return [group for group in groups if not _output_places(group) & taken]

    def reason(self, group: UnitGroup) -> str:
        """Return why a group that was tried cannot be cut without adjusted attributes."""
        return self._reasons[_cut_places(group)]

    def _try(self, groups: Sequence[UnitGroup]) -> tuple[list[UnitGroup], dict[str, str]]:
        """Return the groups that can be cut, and for the others name to reason.

        Groups whose parameter names differ in numbers only, as those of the blocks of a transformer, and that
        adjust the same attributes, are taken to be alike: the first, the middle and the last one are tried at
        first. If all three fail, the others are taken to fail for the same reason as the first.
        """
        families: dict[object, list[UnitGroup]] = defaultdict(list)
        for group in groups:
            layers = tuple(re.sub(r"\d+", "", part.name) for part in group.masked)
            families[layers, tuple(key for _, key in group.attributes)].append(group)
        tried: dict[str, UnitGroup] = {}
        for family in families.values():
            tried |= {group.name: group for group in (family[0], family[len(family) // 2], family[-1])}
        failing = self._trial.failing(uneven_cut(list(tried.values())))
        rest = []
        for family in families.values():
            others = [group for group in family if group.name not in tried]
            if all(group.name in failing for group in family if group.name in tried):
                failing |= {group.name: failing[family[0].name] for group in others}
            else:
                rest += others
        failing |= self._trial.failing(uneven_cut(rest))
        return [group for group in groups if group.name not in failing], failing

    def _adjusted(self, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
        """Return the groups that can be cut with attributes adjusted, each with the first choice that works."""
        left = {group.name: (group, attribute_choices(self._model, group)) for group in groups}
        passed: list[UnitGroup] = []
        for turn in range(max((len(ways) for _, ways in left.values()), default=0)):
            now = [replace(group, attributes=ways[turn]) for group, ways in left.values() if turn < len(ways)]
            passed += self._try(now)[0]
            for group in passed:
                left.pop(group.name, None)
        return passed


def _output_places(group: UnitGroup) -> set[tuple[str, int, int]]:
    """Return the name, dimension and index of each place in the weights that make the group's units."""
    found = set()
    for part in axis_slices(group.slices):
        assert part.index is not None
        found |= {(part.name, part.dim, place) for place in (part.index >= 0).nonzero().flatten().tolist()}
    return found


def _cut_places(group: UnitGroup) -> _CutPlaces:
    """Return a key of all that is cut with the group's units; groups with equal keys are the same."""
    found = set()
    for part in axis_slices((*group.masked, *group.buffers)):
        assert part.index is not None
        found.add((part.name, part.dim, tuple(part.index.tolist())))
    return frozenset(found)
