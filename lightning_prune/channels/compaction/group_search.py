"""The search for unit groups that can be cut, among those that several traces of one model have found."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy
import torch
from torch import nn

from lightning_prune.channels.compaction.alike_groups import others, plain_kind, samples, with_alike
from lightning_prune.channels.compaction.attribute_trials import AttributeTrials
from lightning_prune.channels.compaction.cut_trial import CutTrial
from lightning_prune.channels.compaction.failures import Failure
from lightning_prune.channels.compaction.size_attributes import Attribute, attribute_choices
from lightning_prune.channels.compaction.trial_cuts import least_cut, uneven_cut
from lightning_prune.channels.graph.groups import unique_names
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice, Slice, axis_slices

_CutPlaces: TypeAlias = frozenset[tuple[str, int, bytes]]


class Found(NamedTuple):
    """A unit group, and the number of the trace that found it."""

    group: UnitGroup
    trace: int


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
        self.passed: list[Found] = []
        self._tried: set[tuple[_CutPlaces, bool]] = set()
        self._failures: dict[_CutPlaces, Failure] = {}
        self._made: dict[UnitGroup, Mapping[tuple[str, int], int]] = {}
        self._choices: dict[_CutPlaces, list[tuple[Attribute, ...]]] = {}

    def attempt(self, groups: Iterable[UnitGroup], trace: int, *, adjusted: bool) -> dict[str, str]:
        """Try the groups that were not tried before and share no weights with those in ``passed``.

        Args:
            groups: The groups that one trace has found.
            trace: The number of the trace.
            adjusted: Whether integer attributes of modules that may hold the size of a group are adjusted.

        Returns:
            The names of the tensors that make the units of the groups that failed, with the reasons; none are
            given if ``adjusted``.
        """
        groups = [group for group in self.apart(groups) if (_cut_places(group), adjusted) not in self._tried]
        self._tried |= {(_cut_places(group), adjusted) for group in groups}
        if adjusted:
            self._try_adjusted([Found(group, trace) for group in groups])
            return {}
        passed, failures = self._try(groups)
        self.passed += [Found(group, trace) for group in passed]
        failing = [group for group in groups if group.name in failures]
        self._failures |= {_cut_places(group): failures[group.name] for group in failing}
        return {part.name: failures[group.name].reason for group in failing for part in group.slices}

    def limit(self) -> None:
        """Find the groups of which one unit more has to stay, as where ``squeeze`` drops the dimension of one.

        A group that fails with one more left is dropped.
        """
        self._sort()  # names are unique then
        failing = self._trial.failing(least_cut([group for group, _ in self.passed]))
        self.passed = [
            Found(replace(group, minimum=group.minimum + (group.name in failing)), trace)
            for group, trace in self.passed
        ]
        again = [group for group, _ in self.passed if group.name in failing]
        self._drop(self._trial.failing(least_cut(again)))

    def _drop(self, failing: Mapping[str, Failure]) -> None:
        """Take these groups, by name, out of ``passed``."""
        gone = [group for group, _ in self.passed if group.name in failing]
        self._failures |= {_cut_places(group): failing[group.name] for group in gone}
        self.passed = [found for found in self.passed if found.group.name not in failing]

    def confirm(self) -> None:
        """Try other cuts of all groups in ``passed`` together, when the trial is refined; drop what fails.

        Those that fail are tried again with integer attributes adjusted. The groups that are left are in the
        order of the model's parameters, and have names of their own.
        """
        self._sort()
        failing = self._trial.failing(uneven_cut([group for group, _ in self.passed], other=True))
        again = [found for found in self.passed if found.group.name in failing]
        self._drop(failing)
        adjusted = self._try_adjusted([found for found in again if not found.group.attributes])
        if adjusted:
            self.confirm()

    def _sort(self) -> None:
        order = {name: place for place, (name, _) in enumerate(self._model.named_parameters())}
        self.passed.sort(key=lambda found: (order[found.group.slices[0].name], _first_place(found.group)))
        named = unique_names(group for group, _ in self.passed)
        self.passed = [Found(group, trace) for group, (_, trace) in zip(named, self.passed, strict=True)]

    def apart(self, groups: Iterable[UnitGroup]) -> list[UnitGroup]:
        """Return the groups whose units are made by other weights than those of the groups in ``passed``."""
        taken: dict[tuple[str, int], int] = defaultdict(int)
        for group, _ in self.passed:
            for place, bits in self._places(group).items():
                taken[place] |= bits
        return [
            group
            for group in groups
            if not any(bits & taken[place] for place, bits in self._places(group).items())
        ]

    def _places(self, group: UnitGroup) -> Mapping[tuple[str, int], int]:
        if group not in self._made:
            self._made[group] = _made_places(group)
        return self._made[group]

    def reason(self, group: UnitGroup) -> str:
        """Return why a group cannot be cut without adjusted attributes."""
        failure = self._failures.get(_cut_places(group))
        return "shares weights with units that failed their trial" if failure is None else failure.reason

    def _try(
        self, groups: Sequence[UnitGroup], *, unlikely: bool = False
    ) -> tuple[list[UnitGroup], dict[str, Failure]]:
        """Return the groups that can be cut, and for the others name to failure.

        All are tried together at first, unless most are likely to fail. If that fails, the first, the middle
        and the last one of those that are alike are tried. If all three fail, the others are taken to fail as
        the first does. What raises an error is looked for first, since that takes less time.

        Args:
            groups: The groups.
            unlikely: Whether most are likely to fail: the three of each kind are tried alone.
        """
        failing: dict[str, Failure] = {}
        left = list(groups)
        if not unlikely and len(left) > 1:
            if self._trial.can_cut(uneven_cut(left)):
                return left, failing
            kinds = self._kinds(left)
            failing = with_alike(kinds, self._trial.raising(uneven_cut(samples(kinds))))
            left = others(groups, failing)
            if failing and self._trial.can_cut(uneven_cut(left)):
                return left, failing
        failing |= self._failing(left, apart=unlikely)
        return others(groups, failing), failing

    def _failing(self, groups: Sequence[UnitGroup], *, apart: bool) -> dict[str, Failure]:
        """Return the groups that cannot be cut, name to failure.

        Args:
            groups: The groups.
            apart: Whether to try the first, the middle and the last one of each kind alone.
        """
        kinds = self._kinds(groups)
        few = samples(kinds)
        found: dict[str, Failure] = {}
        for part in [[group] for group in few] if apart else [few]:
            found |= self._trial.failing(uneven_cut(part))
        failing = with_alike(kinds, found)
        left = others(groups, failing)
        if len(left) > (1 if apart else len(few) - len(found)):  # others than those tried, or not together
            failing |= self._trial.failing(uneven_cut(left))
        return failing

    def _try_adjusted(self, candidates: Iterable[Found]) -> bool:
        """Add to ``passed`` the groups that can be cut with attributes adjusted, each with the first such set.

        Groups that adjust the same attribute have to keep the same number of units: they become one group.

        Returns:
            Whether any group was added.
        """
        left = self._attribute_trials(list(candidates))
        count, unlikely = len(self.passed), False
        while now := [
            (Found(replace(found.group, attributes=chosen), found.trace), trials)
            for found, trials in left
            if (chosen := trials.next()) is not None
        ]:
            chosen_now = [found for found, _ in now]
            failures = self._try_joined(chosen_now, unlikely=unlikely) | self._try_apart(chosen_now)
            unlikely = True  # what did not pass with the likeliest set
            for each, trials in now:
                if id(each) in failures:
                    trials.note(each.group.attributes, failures[id(each)])
            free = {id(group) for group in self.apart(found.group for found, _ in left)}
            left = [each for each in left if id(each[0].group) in free]
        return len(self.passed) > count

    def _attribute_trials(self, candidates: Sequence[Found]) -> list[tuple[Found, AttributeTrials]]:
        """Return the groups, each with what chooses the attributes that it is tried with."""
        groups = [group for group, _ in candidates]
        self._choices |= {_cut_places(group): attribute_choices(self._model, group) for group in groups}
        failures: dict[UnitGroup, Failure | None] = {}
        for kind in self._kinds(groups):
            # with no other group cut, whose width would be in the texts of errors
            found = {group: self._alone(group) for group in samples([kind])}
            first = found[kind[0]]
            alike = None if first is None else first.inferred(kind[0].name)
            failures |= dict.fromkeys(kind, alike) | found
        return [
            (found, AttributeTrials(self._choices[_cut_places(found.group)], failures[found.group]))
            for found in candidates
        ]

    def _alone(self, group: UnitGroup) -> Failure | None:
        """Return how a group fails without adjusted attributes; ``None`` if it does not."""
        return self._trial.failing(uneven_cut([group])).get(group.name)

    def _kinds(self, groups: Iterable[UnitGroup]) -> list[list[UnitGroup]]:
        """Return the groups in sets of those that are taken to be alike, as those of a transformer's blocks.

        Names of their parameters, and those of the attributes that they adjust or may adjust, differ in numbers
        of modules only, and the modules that hold the parameters, and those around these, are of the same
        classes, with the same truth values and texts.
        """
        kinds: dict[object, list[UnitGroup]] = defaultdict(list)
        for group in groups:
            layers = tuple(re.sub(r"\d+", "", part.name) for part in group.masked)
            choices = self._choices.get(_cut_places(group), ())
            attributes = [tuple(key for _, key in each) for each in (group.attributes, *choices)]
            holders = dict.fromkeys(part.name.rpartition(".")[0] for part in group.masked)
            around = (name for holder in holders for name in (holder, holder.rpartition(".")[0]))
            modules = tuple(plain_kind(self._model.get_submodule(name)) for name in around)
            kinds[layers, tuple(attributes), modules].append(group)
        return list(kinds.values())

    def _try_joined(self, now: Sequence[Found], *, unlikely: bool) -> dict[int, Failure]:
        """Try each group joined with those that adjust the same attribute, also with those that have passed.

        Args:
            now: The groups.
            unlikely: As for :meth:`_try`.

        Returns:
            The failures, by ``id`` of the group.
        """
        fresh = set(map(id, now))
        sets = [
            each
            for each in _sharing_attributes([*self.passed, *now])
            if not fresh.isdisjoint(map(id, each)) and _can_join(each)
        ]
        joined = [members[0] if len(members) == 1 else _join(members) for members in sets]
        failing = self._try([group for group, _ in joined], unlikely=unlikely)[1]
        failures: dict[int, Failure] = {}
        for found, members in zip(joined, sets, strict=True):
            gone = set(map(id, members))
            if found.group.name in failing:
                failures |= dict.fromkeys(gone, failing[found.group.name])
            else:
                self.passed = [other for other in self.passed if id(other) not in gone] + [found]
        return failures

    def _try_apart(self, now: Sequence[Found]) -> dict[int, Failure]:
        """Try groups that adjust the same attribute, and have not passed as one, until one of them passes.

        Of those that might be one the first alone is tried.

        Returns:
            The failures, by ``id`` of the group.
        """
        free = {id(group) for group in self.apart(group for group, _ in now)}
        known = set(map(id, self.passed))
        sets = [
            each[:1] if _can_join(each) else each
            for each in _sharing_attributes(
                [*self.passed, *(found for found in now if id(found.group) in free)]
            )
            if len(each) > 1 and known.isdisjoint(map(id, each))
        ]
        failures: dict[int, Failure] = {}
        while sets:
            first = [each[0] for each in sets]
            failing = self._try([group for group, _ in first], unlikely=True)[1]
            failures |= {id(each): failing[each.group.name] for each in first if each.group.name in failing}
            self.passed += [each for each in first if id(each) not in failures]
            sets = [each[1:] for each in sets if id(each[0]) in failures and len(each) > 1]
        return failures


def _sharing_attributes(found: Iterable[Found]) -> list[list[Found]]:
    """Return the groups in sets of those that adjust the same attributes, directly or through others."""
    sets: list[tuple[set[Attribute], list[Found]]] = []
    for each in found:
        attributes, members = set(each.group.attributes), [each]
        apart = []
        for other in sets:
            if other[0] & attributes:
                attributes, members = attributes | other[0], other[1] + members
            else:
                apart.append(other)
        sets = [*apart, (attributes, members)]
    return [members for _, members in sets]


def _can_join(members: Sequence[Found]) -> bool:
    """Return whether groups have equal sizes and were found by one trace."""
    return len({(found.group.size, found.trace) for found in members}) == 1


def _join(members: Sequence[Found]) -> Found:
    """Return one group whose unit ``i`` is unit ``i`` of each of these groups."""
    groups = [group for group, _ in members]
    joined = replace(
        groups[0],
        slices=_united(part for group in groups for part in group.slices),
        followers=_united(part for group in groups for part in group.followers),
        buffers=_united(part for group in groups for part in group.buffers),
        attributes=tuple(dict.fromkeys(each for group in groups for each in group.attributes)),
        minimum=max(group.minimum for group in groups),
        heads=any(group.heads for group in groups),
        summed=any(group.summed for group in groups),
        sized_in=tuple(dict.fromkeys(each for group in groups for each in group.sized_in)),
    )
    return Found(joined, members[0].trace)


def _united(parts: Iterable[Slice]) -> tuple[Slice, ...]:
    """Return slices with those along one dimension of one tensor made one, where they have different places."""
    found: dict[tuple[str, int], AxisSlice] = {}
    for part in axis_slices(parts):
        other = found.setdefault((part.name, part.dim), part)
        assert part.index is not None
        assert other.index is not None
        index = torch.where(other.index < 0, part.index, other.index)
        found[part.name, part.dim] = replace(other, index=index)
    return tuple(found.values())


def _first_place(group: UnitGroup) -> int:
    """Return the first index of a group's units in the first weight that makes them."""
    part = axis_slices(group.slices)[0]
    assert part.index is not None
    return int((part.index >= 0).int().argmax())


def _made_places(group: UnitGroup) -> Mapping[tuple[str, int], int]:
    """Return where the weights that make the group's units do so: bits of a number by name and dimension."""
    found: dict[tuple[str, int], int] = defaultdict(int)
    for part in axis_slices(group.slices):
        assert part.index is not None
        bits = numpy.packbits((part.index >= 0).cpu().numpy(), bitorder="little")
        found[part.name, part.dim] |= int.from_bytes(bits.tobytes(), "little")
    return found


def _cut_places(group: UnitGroup) -> _CutPlaces:
    """Return a key of all that is cut with the group's units; groups with equal keys are the same."""
    found = set()
    for part in axis_slices((*group.masked, *group.buffers)):
        assert part.index is not None
        found.add((part.name, part.dim, part.index.cpu().numpy().tobytes()))
    return frozenset(found)
