"""Which sets of integer attributes are tried with a group, given how earlier sets have failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning_prune.channels.compaction.failures import Failure
from lightning_prune.channels.compaction.size_attributes import Attribute

_Set = tuple[Attribute, ...]


class AttributeTrials:
    """The sets of attributes that a group is tried with: all but those that earlier failures rule out.

    A cut stops at the first op that does not fit. A set that passes gets beyond it, so it has an attribute
    that makes the failure another one, and among the failures that this leads to a next one, and so on. A set
    without such a chain is left out. So is one with an attribute that has changed nothing of a failure at the
    op where the others stop. Numbers that change something only together, as two of which the larger one
    counts, are not found.

    Args:
        sets: All sets, as ``attribute_choices`` returns them.
        failure: How the group fails with no attribute adjusted; ``None`` if that is not known.
    """

    def __init__(self, sets: Iterable[_Set], failure: Failure | None) -> None:
        self._left = iter(sets)
        self._failures: dict[frozenset[Attribute], Failure | None] = {frozenset(): failure}
        self._left_out: set[frozenset[Attribute]] = set()
        self._idle: set[tuple[Attribute, object]] = set()  # attributes, and where they have changed nothing

    def next(self) -> _Set | None:
        """Return the next set to try; ``None`` if there is none."""
        for each in self._left:
            if self._is_promising(frozenset(each)):
                return each
            self._left_out.add(frozenset(each))
        return None

    def note(self, attributes: _Set, failure: Failure) -> None:
        """Record how the group has failed with these attributes adjusted."""
        chosen = frozenset(attributes)
        self._failures[chosen] = failure
        self._idle |= {
            (each, failure.place)
            for each, others in _without_one(chosen)
            if self._failures.get(others) == failure
        }

    def _is_promising(self, chosen: frozenset[Attribute]) -> bool:
        known = self._failures.keys() | self._left_out
        # of an attribute in all modules no smaller set is tried before
        return known.isdisjoint(others for _, others in _without_one(chosen)) or any(
            self._leads_on(others) and not self._is_idle(each, self._failures[others])
            for each, others in _without_one(chosen)
        )

    def _is_idle(self, attribute: Attribute, failure: Failure | None) -> bool:
        """Return whether an attribute is known to change nothing of a failure."""
        return failure is not None and (attribute, failure.place) in self._idle

    def _leads_on(self, chosen: frozenset[Attribute]) -> bool:
        """Return whether a set has made the failure of a smaller one, which does so, too, another one."""
        if chosen not in self._failures:
            return False
        failure = self._failures[chosen]
        return not chosen or any(
            self._leads_on(others) and self._failures[others] != failure for _, others in _without_one(chosen)
        )


def _without_one(chosen: frozenset[Attribute]) -> Iterator[tuple[Attribute, frozenset[Attribute]]]:
    """Yield each attribute of a set, and the others."""
    return ((each, chosen - {each}) for each in chosen)
