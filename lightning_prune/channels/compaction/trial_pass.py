"""A pass of a model that trials run, with the tensors that it leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.recorder import OpRecorder
from lightning_prune.core.probes import Probe, pass_mode
from lightning_prune.core.tensors import reachable_tensors


@dataclass(frozen=True)
class TrialPass:
    """A pass that trials run and compare.

    Args:
        probe: Runs the pass.
        recorded: Whether tensors outlive the pass to which its result does not refer.
        compared: Whether it has outputs, the same ones each time; otherwise it has to run, and no more.
    """

    probe: Probe
    recorded: bool
    compared: bool = True

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Run the model, which may change its state, and return all tensors that outlive the pass."""
        probe = self.probe.map_tensors(torch.clone)  # a model may write to its inputs
        with pass_mode(model, training=probe.training):
            if not self.recorded:
                return reachable_tensors(probe(model))
            with OpRecorder(model) as recorder:
                result = probe(model)
            outputs: list[Tensor] = recorder.outputs(result)
            return outputs

    def to(self, dtype: torch.dtype) -> TrialPass:
        """Return the pass on data that is cast to a type."""
        return replace(self, probe=self.probe.to(dtype))
