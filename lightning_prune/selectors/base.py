"""What a selector is: which units go, given their scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lightning_prune.core.parts import Part, is_number
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup, Units

Costs: TypeAlias = Callable[[str], float]


class Selector(Part, ABC):
    """Which units go, given their scores.

    Attributes:
        needs: What training must offer.
    """

    needs = Needs.NOTHING

    @abstractmethod
    def resolve(self, target: float | None) -> float:
        """The share of units that is to be gone at the end, or of the selector's own rule to be in force.

        Raises:
            ValueError: If the selector cannot work with this target.
        """

    @property
    def needs_example(self) -> bool:
        """Whether what it counts shows in a pass of the network only."""
        return False

    @property
    def held(self) -> int:
        """How many training batches are held for it."""
        return 0

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """How many passes of a batch through the network one event takes, to ask for losses."""
        return 0

    @abstractmethod
    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Narrows what each candidate keeps.

        Args:
            candidates: All groups that can be scored now.
            fraction: The schedule's present share of what ``resolve`` gave, above 0.
            costs: Gives the share of the dense network's "params" or "macs" that is left with what the
                candidates keep at present, or its "loss" with that.
        """

    def check(self, share: float, units: Units) -> None:
        """Makes sure that a network has enough to give.

        Args:
            share: What ``resolve`` gave.
            units: All that may be pruned, and what is frozen.

        Raises:
            ValueError: If not.
        """

    def splits(self, group: UnitGroup) -> bool:
        """Whether it can choose among units whose rows lie in several processes."""
        return False

    def refuses(self, group: UnitGroup) -> str | None:
        """Why the selector can do nothing with a group, or ``None`` if it can."""
        return None


def checked_share(target: float | None, selector: Selector) -> float:
    """A target that is a share.

    Raises:
        ValueError: If it is not a number in (0, 1).
    """
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(
            f"target={target!r} must be a number between 0 and 1 for {selector!r}: the share to be removed."
        )
    return float(target)
