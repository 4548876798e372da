"""Tracing of a model on a copy, its multiply-adds by weight, and a check that it always runs the same ops."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.channels.compaction.cut_trial import perturb_
from lightning_prune.channels.graph.recorder import OpRecord, OpRecorder
from lightning_prune.channels.graph.trace import Trace, last_dim
from lightning_prune.channels.graph.trace_record import Split, TraceRecord
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, Probe, evaluation_mode, math_attention


def check_same_ops(model: nn.Module, probe: Probe) -> None:
    """Check that a model runs the same ops when its weights change.

    Raises:
        ValueError: If it runs other ops with perturbed weights, or creates tensors of other shapes.
    """
    if _recorded_ops(model, probe, perturbed=False) != _recorded_ops(model, probe, perturbed=True):
        raise ValueError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            " a little: channels cannot be followed through it. Unstructured prunes it."
        )


def _recorded_ops(model: nn.Module, probe: Probe, *, perturbed: bool) -> list[OpRecord]:
    """Return the ops of one pass, each with the shapes of its results."""
    copied = copy_model(model)  # a copy for each pass, since a pass may change state, such as that of metrics
    if perturbed:
        perturb_(copied)
    recorder = OpRecorder(copied)
    with evaluation_mode(copied), math_attention(), recorder:
        probe(copied)
    return recorder.steps


def macs_by_weight(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Return the multiply-adds of one pass by the name of the parameter that they read.

    The key "" is for all that read no parameter, or several.
    """
    trace, _ = trace_model(model, probe, last_dim)
    amounts = {"": 0}
    for amount, _, names in trace.op_costs:
        name = next(iter(names)) if len(names) == 1 else ""
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def trace_model(
    model: nn.Module, probe: Probe, split: Split, deadline: Deadline | None = None
) -> tuple[TraceRecord, dict[str, str]]:
    """Trace a model in evaluation mode and, if that leaves parameters unused, in training mode as well.

    Auxiliary heads, for example, run in training mode only. Multiply-adds are counted for the pass of ``probe``
    in evaluation mode.

    Args:
        model: Is not changed.
        probe: Runs the model; its ``further_passes`` are traced as well.
        split: As for :class:`TraceRecord`.
        deadline: When to stop; ``None`` for no limit.

    Returns:
        The record of the trace, and the parameters of two or more dimensions that took no part in any pass,
        name to reason.
    """
    copied = copy_model(model)
    trace = Trace(copied, split, deadline)
    reason = "took no part in the forward pass"
    with evaluation_mode(copied):
        for each in (probe, *probe.further_passes):
            trace.follow(copied, each, count=each is probe)
        if not trace.record.used.issuperset(name for name, _ in copied.named_parameters()):
            _train_except_norms(copied)
            try:
                for each in (probe, *probe.further_passes):
                    trace.follow(copied, each)
            except Exception as error:  # a user's forward may raise anything
                reason += f", which fails in training mode with {error!r}"
    matrices = [name for name, parameter in copied.named_parameters() if parameter.ndim > 1]
    return trace.record, {name: reason for name in matrices if name not in trace.record.used}


def _train_except_norms(model: nn.Module) -> None:
    """Set training mode, except for batch and instance norms, which may need several values for statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
