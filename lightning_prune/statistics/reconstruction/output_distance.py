"""How far the outputs of two networks are apart on calibration batches."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.core.outermost_calls import outermost_calls
from lightning_prune.core.probes import evaluation_mode, math_attention
from lightning_prune.core.tensors import reachable_tensors
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.reconstruction.lockstep import run_of


def output_distance(calibration: Calibration, before: nn.Module, after: nn.Module) -> float:
    """Return the sum of squares of the differences of two networks' outputs.

    Outputs are what modules with parameters return that no other module calls: the network, or in a step what
    it calls. The loss that a step returns is none.
    """
    total = torch.zeros((), dtype=torch.float64, device=next(before.parameters()).device)
    for probe in calibration.passes:
        outputs = []
        for model in (before, after):
            run = run_of(probe, model)
            with evaluation_mode(run.network), math_attention(), outermost_calls(run.network) as calls:
                run.start()
            outputs.append([each for each in reachable_tensors(calls.outputs) if each.is_floating_point()])
        for one, other in zip(*outputs, strict=False):
            if one.shape == other.shape:  # as it need not be where a step counts what it finds
                total += (one - other).double().square().sum()
    return float(calibration.add_up(total))
