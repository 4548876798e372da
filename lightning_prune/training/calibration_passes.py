"""Passes of a module in evaluation mode on training batches, to see what its layers are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe
from lightning_prune.statistics.reconstruction.layer_calls import LayerCalls
from lightning_prune.training.fit_probes import StepProbe
from lightning_prune.training.lightning_packages import LightningModule, Trainer
from lightning_prune.training.sandbox import failure_of, forward_in


def calibration_passes(trainer: Trainer, module: LightningModule, batches: Sequence[Any]) -> list[Probe]:
    """Return a pass in evaluation mode for each of some training batches.

    It is ``training_step`` or, if more layers run exactly once in that, the ``forward`` that the step calls;
    under manual optimization the step up to its first backward pass, if the whole step fails.

    Args:
        trainer: The module's Trainer.
        module: The module; it does not change.
        batches: Training batches, as ``training_step`` gets them.

    Raises:
        ValueError: If none of these runs on the first batch.
    """

    def forward(batch: Any) -> Probe | None:
        return forward_in(StepProbe(trainer, batch), trainer, module, training=False)[0]

    step, to_backward = partial(StepProbe, trainer), partial(StepProbe, trainer, to_backward=True)
    kinds: list[Callable[[Any], Probe | None]] = [step, forward, to_backward]
    best, most, failures = None, -1, []
    for kind in kinds if not module.automatic_optimization else kinds[:2]:
        if (probe := kind(batches[0])) is None:
            continue
        once, failure = _layers_run_once(probe, module)
        if failure is not None:
            failures.append(failure)
        elif once > most:
            best, most = kind, once
    if best is None:
        raise ValueError(
            f"{type(module).__name__}.training_step does not run in evaluation mode outside the loop"
            f" ({failures[0]!r}), where layers are calibrated: take parts that need no calibration."
        )
    return [each for each in map(best, batches) if each is not None]


def _layers_run_once(probe: Probe, module: LightningModule) -> tuple[int, Exception | None]:
    """Return how many layers run exactly once in a pass, and the exception if it fails."""
    twin = copy_model(module)
    calls = LayerCalls(twin, [name for name, each in module.named_modules() if name and each._parameters])
    failure = failure_of(lambda model: calls.look(partial(probe, model)), twin)
    return sum(count == 1 for count in calls.counts.values()), failure
