"""A module with distillation written into its loss, to compare with."""

from __future__ import annotations

import copy
from typing import Any

from lit import Lit, Manual
from torch import Tensor, nn
from torch.nn import functional as F


class Explicit(Lit):
    """Adds the term to its loss, with the network before the first step as the teacher."""

    weight, temperature = 1.0, 2.0
    teacher: nn.Module | None = None

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        if self.teacher is None:  # no module of this one
            vars(self)["teacher"] = copy.deepcopy(self.net).eval().requires_grad_(False)
        assert self.teacher is not None
        given, wanted = self(images), self.teacher(images)
        divergence = F.kl_div(
            F.log_softmax(given / self.temperature, 1),
            F.softmax(wanted / self.temperature, 1),
            reduction="batchmean",
        )
        return F.cross_entropy(given, labels) + self.weight * self.temperature**2 * divergence


class ExplicitManual(Manual, Explicit):
    """The same under manual optimization."""


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((first - second).detach().abs().max()) for first, second in pairs)
