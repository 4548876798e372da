"""Running sums over observations. They only add, so micro-batches, steps and ranks combine by one rule."""

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
    """The sums of one unit group.

    Args:
        sums: Name to running sum; rows of each are rows of the group's units.
        count: How many observations were added, a 0-d integer tensor.
        features: Sum over observations of one number for each feature that the group's readers take in; empty
            where nothing looks at them.
    """

    sums: dict[str, Tensor]
    count: Tensor
    features: Tensor

    @classmethod
    def zeros(cls, names: tuple[str, ...], like: Tensor, dtype: torch.dtype, features: int = 0) -> Statistics:
        """Empty sums of the shape, device and memory layout of ``like``."""
        return cls(
            {name: torch.zeros_like(like, dtype=dtype) for name in names},
            torch.zeros((), dtype=torch.int64, device=like.device),
            torch.zeros(features, dtype=dtype, device=like.device),
        )

    def add_(self, addends: Mapping[str, Tensor], valid: Tensor) -> None:
        """Adds one observation's values, or nothing where ``valid`` is false. Does not count it."""
        known = valid.device.type == "cpu"  # an accelerator is not waited for
        if known and not valid:
            return
        for name, addend in addends.items():
            self.sums[name].add_(addend if known else torch.where(valid, addend, 0))

    def mean(self, name: str) -> Tensor:
        """The mean over observations."""
        return self.sums[name] / self.count

    def view(self, look: Callable[[Tensor], Tensor]) -> Statistics:
        """The sums of units as ``look`` shows them: what is added there is added here."""
        return replace(self, sums={name: look(tensor) for name, tensor in self.sums.items()})

    def rows(self, start: int, stop: int) -> Statistics:
        """Some rows, to score or to fill a large group piece by piece."""
        return self.view(lambda tensor: tensor[start:stop])

    def reset_(self) -> None:
        """Starts anew."""
        for tensor in (*self.sums.values(), self.count, self.features):
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors."""
        return {"sums": dict(self.sums), "count": self.count, "features": self.features}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over saved sums, as ``STATISTICS`` reads them.

        Raises:
            ValueError: If they are other sums, or of other shapes.
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
