"""Batch norms that train: after new weights their running statistics are those of the calibration batches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.reconstruction.layer_matrices import LayerCall

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms_in_training(model: nn.Module) -> list[str]:
    """Return the names of the batch norms that are in training mode and keep running statistics."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) in _KINDS and module.training and module.track_running_stats
    ]


class BatchStatistics:
    """Normalizes passes of a network as in training, from its first layer with new weights on.

    Layers after a batch norm then get the inputs that training will give them, with the noise of the statistics
    of a batch; weights that suit running statistics alone may be useless in training. The running statistics
    become the means of those of the batches.

    Args:
        network: The network, whose tensors its passes share.
        names: Names of its batch norms that are in training mode.
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self.norms: dict[str, Any] = {name: network.get_submodule(name) for name in names}
        self._begun = False
        self._taken: set[str] = set()

    def follow(self, network: nn.Module) -> None:
        """See the batch norms of a pass, a copy of the network in evaluation mode."""
        for name in self.norms:
            network.get_submodule(name).register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)

    def begin(self) -> None:
        """Take the statistics of batches in what the passes come to from now on."""
        self._begun = True

    def average(self, calibration: Calibration) -> None:
        """Give the running statistics their means over the batches of all processes."""
        for name, norm in self.norms.items():
            batches = norm.num_batches_tracked.double() * (name in self._taken)
            total = calibration.add_up(batches)
            if total:
                for each in (norm.running_mean, norm.running_var):
                    each.copy_(calibration.add_up(each.double() * batches) / total)

    def _enter(self, name: str, module: Any, args: Any, kwargs: Any) -> None:
        inputs = LayerCall(args, kwargs).first
        if self._begun and inputs.numel() > inputs.shape[1]:  # one value a channel has no variance
            if name not in self._taken:
                self._taken.add(name)
                with torch._C.DisableTorchFunction():  # not counted: the pass before does not run it
                    module.reset_running_stats()
            module.training, module.momentum = True, None  # no momentum: the mean over batches
