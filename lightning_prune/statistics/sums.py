"""Running sums over observations, which are added up in the same way over micro-batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.core import schema

_SUMS = schema.dense_tensor("a tensor of floats", torch.is_floating_point)
_COUNT = schema.dense_tensor(
    "a tensor of one whole number of at least 0",
    lambda count: count.dtype == torch.int64 and count.ndim == 0 and int(count) >= 0,
)
STATISTICS = schema.record({"sums": schema.mapping(_SUMS), "count": _COUNT, "features": _SUMS})


@dataclass(frozen=True, eq=False)
class Statistics:
    """The running sums of one unit group.

    Args:
        sums: Name to running sum; the rows of each are rows of the group's units.
        count: Number of observations that were added, a 0-d integer tensor.
        features: Sum over observations of one number for each input feature of the layers that read the group;
            empty if their inputs are not observed.
    """

    sums: dict[str, Tensor]
    count: Tensor
    features: Tensor

    @classmethod
    def zeros(cls, names: tuple[str, ...], like: Tensor, dtype: torch.dtype, features: int = 0) -> Statistics:
        """Return sums of zeros.

        Args:
            names: Names of the sums.
            like: A tensor of the shape, device and memory layout of each sum.
            dtype: Type of the sums.
            features: Number of input features; 0 if they are not observed.
        """
        return cls(
            {name: torch.zeros_like(like, dtype=dtype) for name in names},
            torch.zeros((), dtype=torch.int64, device=like.device),
            torch.zeros(features, dtype=dtype, device=like.device),
        )

    def add_(self, addends: Mapping[str, Tensor], valid: Tensor) -> None:
        """Add the values of one observation to the sums, without adding 1 to ``count``.

        Args:
            addends: Name to the tensor to add to the sum of this name.
            valid: A 0-d bool tensor. Nothing is added if it is False.
        """
        known = valid.device.type == "cpu"  # reading a tensor on an accelerator would wait for it
        if known and not valid:
            return
        for name, addend in addends.items():
            self.sums[name].add_(addend if known else torch.where(valid, addend, 0))

    def mean(self, name: str) -> Tensor:
        """Return the mean over observations of the sum called ``name``."""
        return self.sums[name] / self.count

    def view(self, look: Callable[[Tensor], Tensor]) -> Statistics:
        """Return the statistics of some units, whose sums are views that ``look`` returns of the whole sums."""
        return replace(self, sums={name: look(tensor) for name, tensor in self.sums.items()})

    def rows(self, start: int, stop: int) -> Statistics:
        """Return views of some rows, to score or update a large group piece by piece."""
        return self.view(lambda tensor: tensor[start:stop])

    def of_units(self, places: Tensor) -> Statistics:
        """Return a copy of the statistics of some units, in a group of these alone.

        Args:
            places: The numbers of the units.
        """
        features = self.features[places.to(self.features.device)] if self.features.numel() else self.features
        sums = {name: each[places.to(each.device)] for name, each in self.sums.items()}
        return Statistics(sums, self.count, features)

    def among(self, places: Tensor, size: int) -> Statistics:
        """Return the statistics of a larger group, with 0 for its other units.

        Args:
            places: The numbers that the units have in the larger group.
            size: Number of its units.
        """

        def spread(tensor: Tensor) -> Tensor:
            wide = tensor.new_zeros(size, *tensor.shape[1:])
            return wide.index_copy_(0, places.to(tensor.device), tensor)

        features = spread(self.features) if self.features.numel() else self.features
        return Statistics({name: spread(each) for name, each in self.sums.items()}, self.count, features)

    def reset_(self) -> None:
        """Set all sums and the count to 0."""
        for tensor in (*self.sums.values(), self.count, self.features):
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, the count and the features: tensors, not copies."""
        return {"sums": dict(self.sums), "count": self.count, "features": self.features}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy saved sums, which must be as ``STATISTICS`` reads them.

        Raises:
            ValueError: If their names or shapes differ.
        """
        features = state["features"]
        saved = {name: tuple(tensor.shape) for name, tensor in state["sums"].items()}
        own = {name: tuple(tensor.shape) for name, tensor in self.sums.items()}
        if saved != own or features.shape != self.features.shape:
            raise ValueError(
                f"the state holds sums {saved} and {features.numel()} features, the criterion keeps {own} and"
                f" {self.features.numel()}."
            )
        self.features.copy_(features)
        for name, tensor in state["sums"].items():
            self.sums[name].copy_(tensor)
        self.count.copy_(state["count"])
