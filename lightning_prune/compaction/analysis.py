"""What can be cut out of a model: what the graph couples, and a trial has shown to come out the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.compaction.trial import Trial, uneven
from lightning_prune.graph import Trace, find_groups
from lightning_prune.probe import Probe, evaluating
from lightning_prune.units import Units


def analyse(model: nn.Module, probe: Probe) -> Units:
    """The unit groups of a model, each cut on trial, and what is frozen, with the reason.

    Args:
        model: Stays as it is.
        probe: Runs it.

    Raises:
        ValueError: If the model rejects the example, or gives something else each time.
    """
    trial = Trial(model, probe, ahead=True)
    trace, unseen = _traced(model, probe)
    found = find_groups(model, trace)
    left = found.without(trial.failing(uneven(found.groups)))
    return replace(left, frozen=left.frozen | unseen)


def macs_by_weight(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Multiply-adds of one pass by name of the parameter that they read; "" is what reads none, or several."""
    trace, _ = _traced(model, probe)
    amounts = {"": 0}
    for amount, _, names in trace.terms:
        name = next(iter(names)) if len(names) == 1 else ""
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def _traced(model: nn.Module, probe: Probe) -> tuple[Trace, dict[str, str]]:
    """A trace in evaluation mode and, for what has no part in that, in training mode: auxiliary heads.

    Returns:
        The trace, and name to reason of matrices that it has not seen.
    """
    twin = copy.deepcopy(model)
    trace = Trace(twin)
    why = "took no part in the forward pass"
    with evaluating(twin):
        trace.follow(partial(probe, twin), count=True)
        for other in probe.others:
            trace.follow(partial(other, twin))
        if not trace.seen.issuperset(name for name, _ in twin.named_parameters()):
            _train(twin)
            try:
                for each in (probe, *probe.others):
                    trace.follow(partial(each, twin))
            except Exception as error:  # a user's forward may raise anything
                why += f", which fails in training mode with {error!r}"
    matrices = [name for name, parameter in twin.named_parameters() if parameter.ndim > 1]
    return trace, {name: why for name in matrices if name not in trace.seen}


def _train(model: nn.Module) -> None:
    """Training mode, but for norms: those want more than one value to take statistics of."""
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
