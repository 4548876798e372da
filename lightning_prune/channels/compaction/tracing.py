"""A model run and followed: through which ops its weights go, and what those multiply."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.channels.compaction.cut_trial import perturb_
from lightning_prune.channels.graph.liveness import OpRecord, OpRecorder
from lightning_prune.channels.graph.trace import Trace, last_dim
from lightning_prune.channels.graph.trace_record import Split, TraceRecord
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Deadline, Probe, evaluation_mode, math_attention


def check_same_ops(model: nn.Module, probe: Probe) -> None:
    """Runs a model with its weights and with others.

    Raises:
        ValueError: If it runs other ops then, or makes tensors of other shapes.
    """
    if _recorded_ops(model, probe, stirred=False) != _recorded_ops(model, probe, stirred=True):
        raise ValueError(
            f"{type(model).__name__} runs other ops, or makes tensors of other shapes, when its weights change"
            " a little: channels cannot be followed through it. Unstructured prunes it."
        )


def _recorded_ops(model: nn.Module, probe: Probe, *, stirred: bool) -> list[OpRecord]:
    """What one pass runs, op by op."""
    copied = copy_model(model)  # a second pass of one may differ: metrics count
    if stirred:
        perturb_(copied)
    tape = OpRecorder()
    with evaluation_mode(copied), math_attention(), tape:
        probe(copied)
    return tape.steps


def macs_by_weight(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Multiply-adds of one pass by name of the parameter that they read; "" is what reads none, or several."""
    trace, _ = trace_model(model, probe, last_dim)
    amounts = {"": 0}
    for amount, _, names in trace.terms:
        name = next(iter(names)) if len(names) == 1 else ""
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def trace_model(
    model: nn.Module, probe: Probe, split: Split, deadline: Deadline | None = None
) -> tuple[TraceRecord, dict[str, str]]:
    """A trace in evaluation mode and, for what has no part in that, in training mode: auxiliary heads.

    Args:
        model: Stays as it is.
        probe: Runs it.
        split: Which of the dimensions that come of one has its labels.
        deadline: When to stop.

    Returns:
        The trace, and name to reason of matrices that it has not seen.
    """
    copied = copy_model(model)
    trace = Trace(copied, split, deadline)
    why = "took no part in the forward pass"
    with evaluation_mode(copied):
        trace.follow(copied, probe, count=True)
        for other in probe.others:
            trace.follow(copied, other)
        if not trace.record.used.issuperset(name for name, _ in copied.named_parameters()):
            _train_but_norms(copied)
            try:
                for each in (probe, *probe.others):
                    trace.follow(copied, each)
            except Exception as error:  # a user's forward may raise anything
                why += f", which fails in training mode with {error!r}"
    matrices = [name for name, parameter in copied.named_parameters() if parameter.ndim > 1]
    return trace.record, {name: why for name in matrices if name not in trace.record.used}


def _train_but_norms(model: nn.Module) -> None:
    """Training mode, but for norms: those want more than one value to take statistics of."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
