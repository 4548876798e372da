"""What Torch-Pruning makes of a model, and whether its output is that of the masked model."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.probes import Probe, as_probe, relative_difference
from lightning_prune.core.tensors import reachable_tensors


def prune_with_peer(model: nn.Module, example: Any, kept: Sequence[str]) -> dict[str, Any]:
    """Cut half of the channels by magnitude, as Torch-Pruning does by default, in double precision.

    Args:
        model: Is cut. No two of its parameters are equal.
        example: What ``Pruner`` takes; its first pass is what Torch-Pruning traces.
        kept: Names of modules that it is told to leave alone, such as layers that give outputs.

    Returns:
        "seconds" of processor time for its graph and its cut; "kept", the share of the parameters that are
        left; "difference", that of the outputs of the cut model and of one whose channels are 0 instead,
        relative to the largest; or "error" alone.
    """
    probe = as_probe(example).to(torch.float64)
    masked = copy.deepcopy(model.double())
    try:
        seconds = cut_with_peer(model, probe, kept)
        found = _outputs(model, probe)
    except Exception as error:  # of another library
        return {"error": repr(error)[:300]}
    share = sum(each.numel() for each in model.parameters()) / sum(each.numel() for each in masked.parameters())
    zero_what_went_(masked, model)
    difference = relative_difference(_outputs(masked, probe), found)
    return {"seconds": seconds, "kept": share, "difference": difference}


def cut_with_peer(model: nn.Module, probe: Probe, kept: Sequence[str]) -> float:
    """Cut half of the channels by magnitude, as Torch-Pruning does by default; return the processor time.

    Args:
        model: Is cut.
        probe: Runs the model.
        kept: Names of modules to leave alone.
    """
    import torch_pruning

    begun = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        None,
        forward_fn=lambda network, _: probe(network),
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(name) for name in kept],
        num_heads={each: each.num_heads for each in model.modules() if isinstance(each, nn.MultiheadAttention)},
    )
    pruner.step()
    return time.process_time() - begun


@torch.no_grad()
def zero_what_went_(dense: nn.Module, cut: nn.Module) -> None:
    """Zero each element of a model's parameters that a cut copy no longer has: no two elements are equal."""
    left = dict(cut.named_parameters())
    for name, parameter in dense.named_parameters():
        parameter.mul_(torch.isin(parameter, left[name]))


@torch.no_grad()
def _outputs(model: nn.Module, probe: Probe) -> list[Tensor]:
    return reachable_tensors(probe(model))
