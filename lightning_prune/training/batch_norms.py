"""Batch norms: running statistics that are taken anew on a few batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.core.probes import Probe


@torch.no_grad()
def renew_statistics_(model: nn.Module, passes: Sequence[Probe]) -> None:
    """Set the running statistics of all batch norms to the means over some passes.

    Args:
        model: The model, in evaluation mode; only its batch norms use the statistics of each batch meanwhile.
        passes: Runs the model on a batch each.
    """
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    momenta = [each.momentum for each in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all passes
        norm.train()
    for each in passes:
        each(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
