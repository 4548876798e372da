"""The base class of structures, which divide the weights of a model into unit groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from lightning_prune.core.averages import keep_apart
from lightning_prune.core.parts import Part
from lightning_prune.units.groups import Units, listed_by_reason

_Self = TypeVar("_Self", bound="Structure")


class Structure(Part, ABC):
    """Defines which weights of a model are pruned together as units.

    Attributes:
        needs_example: Whether ``units`` needs an example, to trace the forward pass of the model.
    """

    needs_example: ClassVar[bool] = False

    @abstractmethod
    def units(self, model: nn.Module, example: Any = None) -> Units:
        """Return the unit groups of a model, and the frozen parameters and groups, with the reasons.

        Args:
            model: The model to prune.
            example: A tensor, a tuple of ``forward``'s arguments, a mapping of its keyword arguments, a list of
                several of these, or a probe, for structures that trace the forward pass of the model.

        Raises:
            ValueError: If there is nothing to prune.
        """

    def by_name(self: _Self, model: nn.Module) -> _Self:
        """Return the structure with names of modules in place of their kinds, in all that it is given."""
        return self

    def leaves_out(self, name: str) -> bool:
        """Return whether the user has said that a module or parameter of this name is not pruned."""
        return False

    def keep_copies_apart(self, model: nn.Module) -> None:
        """Note of the modules that the user leaves out that they are no moving copies, but teachers, say."""
        named = self.by_name(model)
        for name, module in model.named_modules():
            if named.leaves_out(name):
                keep_apart(module)

    def nothing_in(self, model: nn.Module, frozen: Mapping[str, str]) -> ValueError:
        """Return the error to raise for a model without units.

        Args:
            model: The model.
            frozen: Name to reason of what is not pruned.
        """
        empty = next(model.parameters(), None) is None
        why = "It has no parameters." if empty else listed_by_reason(frozen)
        return ValueError(f"{self!r} finds nothing to prune in {type(model).__name__}. {why}".rstrip())
