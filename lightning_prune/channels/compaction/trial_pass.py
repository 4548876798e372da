"""A pass of a model that trials run, with the tensors that it leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_prune.channels.graph.recorder import OpRecorder, PassRecord
from lightning_prune.core.probes import Probe, pass_mode
from lightning_prune.core.progress import count_pass
from lightning_prune.core.tensors import reachable_tensors


@dataclass(frozen=True)
class TrialPass:
    """A pass that trials run and compare.

    Args:
        probe: Runs the pass, on inputs that are as small as may be.
        reduced: Whether these are smaller than those of the example.
        example: Runs it on those of the example.
        number: Which of the passes of the example's probe it is.
        recorded: Whether tensors outlive the pass to which its result does not refer.
        decided: Whether values decide shapes in it.
        written: Names of the parameters that it writes to.
        runs_in_training: Whether the model does the same in training mode.
        compared: Whether it has outputs, the same ones each time; otherwise it has to run, and no more.
        variant: Runs it on other inputs; ``None`` if the model runs on no others.
        cast: Whether it runs in single precision, whatever the types of model and example.
    """

    probe: Probe
    reduced: bool
    example: Probe
    number: int
    recorded: bool
    decided: bool
    written: frozenset[str]
    runs_in_training: bool
    compared: bool = True
    variant: Probe | None = None
    cast: bool = True

    @classmethod
    def of(cls, record: PassRecord) -> TrialPass:
        """Return a recorded pass."""
        return cls(
            probe=(record.small or record).probe.with_further_passes(()),
            reduced=record.small is not None,
            example=record.probe.with_further_passes(()),
            number=record.number,
            recorded=record.kept_elsewhere,
            decided=any(record.decided),
            written=record.written,
            runs_in_training=record.runs_in_training,
        )

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Run the model, which may change its state, and return all tensors that outlive the pass."""
        count_pass()
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
        variant = None if self.variant is None else self.variant.to(dtype)
        return replace(self, probe=self.probe.to(dtype), example=self.example.to(dtype), variant=variant)

    def on(self, probe: Probe) -> TrialPass:
        """Return the pass on other inputs, which another probe runs it on."""
        return replace(self, probe=probe)

    def of_example(self, probe: Probe) -> TrialPass:
        """Return the same pass of an equal example.

        Args:
            probe: The probe of that example, with its further passes.
        """
        example = probe.passes[self.number].with_further_passes(())
        if self.probe.training:
            example = example.in_training_mode()
        return replace(self, example=example, probe=self.probe if self.reduced else example)

    def without_example(self) -> TrialPass:
        """Return the pass without the inputs of its example, which may be large."""
        empty = self.probe.map_tensors(lambda tensor: tensor.new_empty(0))
        return replace(self, example=empty, probe=self.probe if self.reduced else empty)
