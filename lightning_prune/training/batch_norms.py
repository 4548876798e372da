"""Batch norms: running statistics that are taken anew on a few batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.core.probes import Probe


@torch.no_grad()
def renew_statistics_(model: nn.Module, passes: Sequence[Probe]) -> None:
    """Set the running statistics of the batch norms that some passes run to the means over them.

    Args:
        model: The model, in evaluation mode; only its batch norms use the statistics of each batch meanwhile.
        passes: Runs the model on a batch each.

    Raises:
        ValueError: If a batch is too small for statistics.
    """
    norms = _norms(model)
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all passes
        norm.train()
    for each in passes:
        each(model)
    for norm, momentum, earlier in zip(norms, momenta, before, strict=True):
        if not int(norm.num_batches_tracked or 0):  # no pass came to it
            norm.load_state_dict(earlier)
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def copy_statistics_(source: nn.Module, target: nn.Module) -> None:
    """Copy the running statistics of all batch norms from a copy of a model."""
    for one, other in zip(_norms(source), _norms(target), strict=True):
        for name, buffer in one.named_buffers(recurse=False):
            other.get_buffer(name).copy_(buffer)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
