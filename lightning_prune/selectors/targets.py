"""Targets: one of the whole network, or one for each pattern of names, whose units are selected apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from lightning_prune.core.patterns import check_patterns, matches, names_of_kinds
from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.acceptance import check_units
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.units.groups import UnitGroup, Units, listed_by_reason

Target: TypeAlias = float | Mapping[str, float] | None  # as a user gives it


def resolved(target: Target, selector: Selector, *, optional: bool = False) -> dict[str | None, float]:
    """Return the share that the selector makes of each target: by pattern, or under ``None`` of the only one.

    Args:
        target: The targets.
        selector: The selector.
        optional: Whether there need not be a target where the selector takes one; the result is empty then.

    Raises:
        ValueError: If the selector cannot work with a target, or takes none.
    """
    if optional and target is None and not _needs_no_target(selector):
        return {}
    if not isinstance(target, Mapping) or _needs_no_target(selector):
        return {None: selector.resolve(target)}  # type: ignore[arg-type]
    if not target or not all(isinstance(pattern, str) for pattern in target):
        raise ValueError(f"target={target!r} must be a number, or map patterns of names to numbers.")
    shares: dict[str | None, float] = {}
    for pattern, each in target.items():
        with _naming(pattern):
            shares[pattern] = selector.resolve(each)
    return shares


def _needs_no_target(selector: Selector) -> bool:
    """Return whether the selector decides the count itself; what it says to a target is then its own answer."""
    try:
        selector.resolve(None)
    except ValueError:
        return False
    return True


@contextmanager
def _naming(pattern: str | None) -> Iterator[None]:
    """Put the pattern in front of an error that is raised in the block."""
    try:
        yield
    except ValueError as error:
        raise error if pattern is None else ValueError(f"for {pattern!r}, {error}") from None


@dataclass(frozen=True, eq=False)
class Quota:
    """Unit groups that are selected together, to a target of their own.

    Args:
        pattern: The pattern of names that the target is given for; ``None`` if it is that of the whole network.
        target: The target as the user gave it.
        share: The share of the units, or of their budget, that is removed at the end.
        units: The groups, with the budgets that it is a share of.
    """

    pattern: str | None
    target: Target
    share: float
    units: Units

    def check(self, selector: Selector, criterion: Criterion) -> None:
        """Raise ValueError if the target is out of reach, or the groups cannot be pruned by these parts."""
        with _naming(self.pattern):
            check_units(self.units.groups, self.target, self.share, criterion)
            selector.check(self.share, self.units)

    def select(
        self,
        selector: Selector,
        candidates: Sequence[Candidates],
        fraction: float,
        kept: Mapping[str, Tensor],
        loss: Callable[[], float],
    ) -> None:
        """Remove units of these groups.

        Args:
            selector: Chooses the units.
            candidates: All groups of the network that can be scored now.
            fraction: Share of the target, above 0.
            kept: The units that the whole network keeps at present: group name to one bool a unit.
            loss: Returns the loss of that network.
        """
        own = {group.name for group in self.units.groups}

        def costs(budget: str) -> float:
            if budget == "loss":
                return loss()
            return self.units.budgets[budget].cost(kept) / self.units.budgets[budget].total

        if chosen := [each for each in candidates if each.group.name in own]:
            selector.select(chosen, fraction * self.share, costs)


def divided(
    units: Units, model: nn.Module, target: Target, shares: Mapping[str | None, float]
) -> tuple[Units, tuple[Quota, ...]]:
    """Return the units that a target covers, and their division among the targets.

    A group belongs to the first pattern that matches a weight that makes its units, by any of its names. Groups
    that no pattern matches are frozen.

    Args:
        units: The unit groups that may be pruned.
        model: Their model.
        target: One target, or pattern of parameter and module names to target.
        shares: The shares that the selector makes of them, as :func:`resolved` returns them.

    Raises:
        ValueError: If a pattern matches nothing, or no unit that may go.
    """
    if not isinstance(target, Mapping) or None in shares:
        return units, tuple(Quota(None, target, share, units) for share in shares.values())
    names = _all_names(model)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    named = {pattern: names_of_kinds("target", [pattern], model) for pattern in target}
    for patterns in named.values():
        check_patterns("target", patterns, modules.union(*names.values()))

    def belongs(group: UnitGroup, pattern: str) -> bool:
        return any(matches(name, named[pattern]) for part in group.slices for name in names[part.name])

    first = {
        group.name: next((each for each in target if belongs(group, each)), None) for group in units.groups
    }
    reasons = {name: "no pattern of target covers it" for name, found in first.items() if found is None}
    left = units.without(reasons)
    quotas = []
    for pattern, each in target.items():
        own = left.among({name for name, found in first.items() if found == pattern})
        if not own.groups:
            taken = any(belongs(group, pattern) for group in left.groups)
            frozen = {name: why for name, why in units.frozen.items() if matches(name, named[pattern])}
            why = listed_by_reason(frozen) or "it matches no weight that makes units"
            why = "a pattern before it takes what it matches" if taken else why
            raise ValueError(f"target[{pattern!r}]={each!r} has no units to remove: {why}.")
        quotas.append(Quota(pattern, each, shares[pattern], own))
    return left, tuple(quotas)


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter, by its first one: tied parameters have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[first[id(parameter)]].append(name)
    return names
