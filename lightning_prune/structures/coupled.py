"""The base class of structures whose units span several layers: channels, attention heads and experts."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from lightning_prune.channels.compaction.analysis import analyse
from lightning_prune.core.parts import check_counts, is_number
from lightning_prune.core.patterns import Patterns, check_patterns, matches, set_patterns, with_names
from lightning_prune.core.probes import Probe, as_probe, example_for
from lightning_prune.core.tensors import check_materialized
from lightning_prune.structures.base import Structure
from lightning_prune.units.groups import UnitGroup, Units

_Self = TypeVar("_Self", bound="Coupled")


@dataclass(frozen=True, repr=False)
class Coupled(Structure):
    """Units that span several layers, found in forward passes on an example.

    Args:
        include: Glob pattern over parameter and module names, or class of modules, or several of these. With
            it, only units that are made by a matching parameter or module are pruned; also by those that do not
            train.
        exclude: The same, for units that are not pruned, in all layers that they are coupled to.
        round_to: The number that a layer keeps is a multiple of this.
        minimum: How many each layer keeps at least: a number or, below 1, a share.
        max_seconds: Time limit to find the units and to try each cut, in seconds.

    Raises:
        ValueError: If a pattern is neither a string nor a class, or a number is out of range.
    """

    needs_example = True

    include: Patterns = None
    exclude: Patterns = None
    round_to: int = 1
    minimum: float = 1
    max_seconds: float = 600

    def __post_init__(self) -> None:
        set_patterns(self, "include", "exclude")
        check_counts(round_to=self.round_to)
        if not is_number(self.minimum) or self.minimum <= 0 or (self.minimum > 1 and self.minimum % 1 != 0):
            raise ValueError(
                f"minimum={self.minimum!r} must be a whole number of at least 1, or a share below 1."
            )
        if not (is_number(self.max_seconds) or self.max_seconds == math.inf) or self.max_seconds <= 0:
            raise ValueError(f"max_seconds={self.max_seconds!r} must be a number above 0.")

    def search(self, model: nn.Module, probe: Probe) -> Units:
        """Return the units of a model that can be cut, whatever the arguments leave out.

        By default those that a trace finds, and that trial cuts confirm.

        Args:
            model: Is not changed.
            probe: Runs the model.

        Raises:
            ValueError: If the model cannot run, or ``max_seconds`` are over.
        """
        named = [name for name, _ in model.named_parameters() if matches(name, self.include)]
        return analyse(model, probe, self.max_seconds, named).units

    @abstractmethod
    def includes(self, group: UnitGroup) -> bool:
        """Return whether this structure prunes groups of this kind."""

    def why_not(self, group: UnitGroup, found: Units) -> str | None:
        """Return why a group is of another kind than this structure prunes, if there is more to say.

        Args:
            group: A group that is not included.
            found: All that the search has found.
        """
        return None

    @abstractmethod
    def sizes(self, group: UnitGroup) -> set[int]:
        """Return how much a unit counts in each of its layers, for ``round_to`` and ``minimum``."""

    def by_name(self: _Self, model: nn.Module) -> _Self:
        """Return the structure with names of modules in place of their kinds."""
        return with_names(self, model)

    def units(self, model: nn.Module, example: Any = None) -> Units:
        """Return one group for each set of layers with coupled units; for arguments see the base class."""
        example = example_for(model, example)
        if example is None:
            raise ValueError(
                f"example=None: {self!r} follows an example through the model. Give what forward is called"
                " with: a tensor, a tuple of its arguments, a mapping of its keyword arguments, or a list of"
                " several of these; a LightningModule may have it as example_input_array."
            )
        check_materialized(model)
        units = self.by_name(model)._found(model, example)
        if not units.groups:
            raise self.nothing_in(model, units.frozen)
        return units

    def _found(self, model: nn.Module, example: Any) -> Units:
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
        check_patterns("include", self.include, names)
        check_patterns("exclude", self.exclude, names)
        found = self.search(model, as_probe(example))
        left_out = {
            group.name: why for group in found.groups if (why := self._left_out(group, found)) is not None
        }
        limited = tuple(self._limited(group) for group in found.groups)
        whole = {
            group.name: f"keeps all: no smaller number is a multiple of round_to={self.round_to}"
            for group in limited
            if self.round_to > 1 and group.multiple >= group.size
        }
        return replace(found, groups=limited).without(whole | left_out)

    def _limited(self, group: UnitGroup) -> UnitGroup:
        """Return a group with its limits in units, the least number and the multiple that suit all layers."""
        sizes = self.sizes(group)
        least = self.minimum * group.size if self.minimum < 1 else self.minimum / min(sizes)
        multiples = (self.round_to // math.gcd(self.round_to, size) for size in sizes)
        minimum = max(math.ceil(least), group.minimum)
        return replace(group, minimum=minimum, multiple=math.lcm(*multiples), named=self._named(group))

    def leaves_out(self, name: str) -> bool:
        """Return whether ``exclude`` matches the name."""
        return matches(name, self.exclude)

    def _named(self, group: UnitGroup) -> bool:
        """Return whether ``include`` matches a weight that makes the units."""
        return any(matches(part.name, self.include) for part in group.slices)

    def _left_out(self, group: UnitGroup, found: Units) -> str | None:
        """Return why the arguments leave a group out; ``None`` if they do not."""
        if not self.includes(group):
            return self.why_not(group, found) or f"is not of the kind that {type(self).__name__} prunes"
        if any(matches(part.name, self.exclude) for part in group.slices):
            return "exclude names it"
        return None if self.include is None or self._named(group) else "include does not name it"
