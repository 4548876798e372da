"""The base class of selectors, which decide from the scores of the units which ones to remove."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import nn

from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.parts import Part, is_number
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup, Units

_Self = TypeVar("_Self", bound="Selector")
Costs: TypeAlias = Callable[[str], float]  # see the argument of ``Selector.select``


class Selector(Part, ABC):
    """Decides which units to remove, given their scores.

    Attributes:
        needs: The quantities that training must provide (gradients, activations or losses); none by default.
        pattern: Numbers n and m if the selector keeps n of each m consecutive inputs; ``None`` by default.
    """

    needs = Needs.NOTHING
    pattern: tuple[int, int] | None = None

    def resolve(self, target: float | None) -> float:
        """Return the share that the schedule scales; by default the target itself, a number in (0, 1).

        It is the share of the units or of the budget to remove at the end, or 1 where a rule of the selector's
        own decides the count.

        Raises:
            ValueError: If the selector cannot work with this target.
        """
        if not is_number(target) or not 0 < target < 1:
            raise ValueError(
                f"target={target!r} must be a number above 0 and below 1 for {self!r}: the share to be removed."
            )
        return float(target)

    @property
    def needs_example(self) -> bool:
        """Whether the selector counts costs that only a forward pass shows, such as multiply-adds."""
        return False

    @property
    def held(self) -> int:
        """Number of calibration batches (training batches kept to evaluate losses) that the selector uses."""
        return 0

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return how many passes of a batch through the network one event takes to evaluate losses."""
        return 0

    def measured(self, units: Units, model: nn.Module, example: Any) -> tuple[Units, LatencyTable | None]:
        """Return the units with the budget that the selector measures on the model, and its table.

        By default there is none. If there are several processes, all must call this.

        Args:
            units: The unit groups that may be pruned.
            model: Their model; it is not changed.
            example: What ``forward`` is called with, or a probe; ``None`` if the selector needs none.
        """
        return units, None

    def with_table(self: _Self, table: LatencyTable) -> _Self:
        """Return the selector with a table to take, if it would measure one; by default the selector itself."""
        return self

    @abstractmethod
    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove units: set entries of ``kept`` of the candidates to False.

        Args:
            candidates: All groups that can be scored now.
            fraction: The value of ``resolve`` times the schedule's present value, above 0.
            costs: Returns, for the units that the candidates keep at present, the share of the dense network's
                "params", "macs" or "latency" that is left, or the "loss" of the network.
        """

    def check(self, share: float, units: Units) -> None:
        """Check that removing units of this network can reach the target.

        Args:
            share: The value of ``resolve``.
            units: The unit groups that may be pruned, what is frozen, and the budgets.

        Raises:
            ValueError: If the target is out of reach.
        """

    def limited(self, group: UnitGroup) -> UnitGroup:
        """Return a group with the limits that the selector sets to its widths; by default the group itself."""
        return group

    def splits(self, group: UnitGroup) -> bool:
        """Return whether the selector can prune a group whose rows are divided among processes."""
        return False

    def refuses(self, group: UnitGroup) -> str | None:
        """Return why the selector cannot prune a group, or ``None`` if it can."""
        return None
