"""What a structure is: it says what lives or dies together in a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from lightning_prune.core.parts import Part
from lightning_prune.units.groups import Units


class Structure(Part, ABC):
    """Which units a model has.

    Attributes:
        needs_example: Whether ``units`` follows an example through the model.
    """

    needs_example: ClassVar[bool] = False

    @abstractmethod
    def units(self, model: nn.Module, example: Any = None) -> Units:
        """The unit groups of a model, and what is frozen, with reasons.

        Args:
            model: Whose parameters.
            example: A tensor, a tuple of ``forward``'s arguments, or a probe, for structures that follow the
                data through the model.

        Raises:
            ValueError: If there is nothing to prune.
        """
