"""Modules that compute by a formula once something was cut out of them: they change their class, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class NarrowForm(ABC):
    """What a module of users' code computes, for as many places as are left of it.

    Attributes:
        width: The number of places before any were cut.
        whole: The class of the module then.
    """

    width: int
    whole: type[nn.Module]

    @abstractmethod
    def left(self, module: nn.Module) -> int:
        """Return how many places are left of a module."""

    @abstractmethod
    def narrow_class(self, module: nn.Module) -> type[NarrowModule]:
        """Return the class of a module that computes by the form."""

    def open_(self, module: nn.Module) -> None:
        """Let a module compute by the form, through which channels can be followed."""
        narrow = self.narrow_class(module)
        module.form = self  # type: ignore[assignment]  # modules take any attribute
        module.__class__ = narrow

    def set_(self, module: nn.Module) -> None:
        """Let a module compute by the form if places were cut, and by its own code if none is missing."""
        if self.left(module) != self.width:
            self.open_(module)
        elif isinstance(module, NarrowModule):
            del module.form
            module.__class__ = self.whole  # type: ignore[assignment]


class NarrowModule(nn.Module):
    """A module after some of its places were cut.

    Attributes:
        form: What it computes; other attributes are those of the module that it was.
    """

    form: NarrowForm
