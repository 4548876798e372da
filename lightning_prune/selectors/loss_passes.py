"""The number and the duration of the passes through the network with which an event evaluates the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_prune.criteria import Criterion
from lightning_prune.selectors.base import Selector
from lightning_prune.statistics.losses import Losses, LossEvaluator
from lightning_prune.units.groups import UnitGroup


def check_passes(criterion: Criterion, groups: Sequence[UnitGroup], time_taken: str = "") -> None:
    """Raise ValueError if an event would take more passes than the criterion allows."""
    passes = criterion.passes(groups)
    if passes > criterion.max_passes:
        raise ValueError(
            f"{criterion!r} would take {passes:,} passes of a batch through the network in one"
            f" event{time_taken}: raise max_passes={criterion.max_passes!r}, leave layers out with"
            " include and exclude, or take another criterion."
        )


def estimate_seconds(
    model: nn.Module, losses: Losses, criterion: Criterion, selector: Selector, groups: Sequence[UnitGroup]
) -> float:
    """Return how many seconds an event is likely to spend on loss evaluations, measured on the first batch.

    Raises:
        ValueError: If an event would take more passes than the criterion allows.
    """
    evaluator = LossEvaluator(model, Losses(losses.loss, losses.batches[:1]))
    evaluator.loss(1)  # the first pass takes longer
    asked = criterion.passes(groups) * _seconds(lambda: criterion.rehearse(groups, evaluator))
    check_passes(criterion, groups, f", about {asked / 60:.3g} minutes here")
    return asked + selector.passes(groups) * _seconds(lambda: evaluator.loss(1))


def _seconds(call: Callable[[], Tensor]) -> float:
    """Return how long a call takes, until its result has been computed."""
    begun = time.perf_counter()
    float(call())  # waits for an accelerator
    return time.perf_counter() - begun
