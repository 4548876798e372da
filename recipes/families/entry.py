"""One model of the table: how it is built, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model of the table.

    Attributes:
        make: Returns the model with random weights.
        example: Returns what ``Pruner`` takes as its example.
    """

    make: Callable[[], nn.Module]
    example: Callable[[], Any]

    def build(self) -> nn.Module:
        """Return the model in evaluation mode, the same one each time.

        Kernels are drawn such that signals keep their size through many layers, or what is lost early would not
        be seen in the output. Noise is added to all parameters, so that none is exactly 0 or 1, and means of
        batch norms are random.
        """
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 2:
                    nn.init.kaiming_normal_(parameter, nonlinearity="relu")
                parameter.add_(0.02 * torch.randn_like(parameter))
            for leaf, buffer in model.named_buffers():
                if leaf.endswith("running_mean"):
                    buffer.normal_(0, 0.1)
        return model

    def inputs(self) -> Any:
        """Return the example, the same one each time."""
        torch.manual_seed(1)
        return self.example()


def images(size: int, *, frames: int | None = None, count: int = 1) -> Callable[[], Tensor]:
    """Return a function that returns random square images, or clips of them.

    Args:
        size: Height and width in pixels.
        frames: Length of a clip; ``None`` for images.
        count: Number of images.
    """
    depth = () if frames is None else (frames,)
    return lambda: torch.randn(count, 3, *depth, size, size)
