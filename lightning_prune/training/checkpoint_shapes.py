"""The shapes of a model while a checkpoint is loaded into it: those of the network that was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.core.averages import Average
from lightning_prune.export import compacted
from lightning_prune.training.pruned_network import PrunedNetwork


@contextmanager
def loading(
    network: PrunedNetwork,
    model: nn.Module,
    averages: Sequence[Average],
    checkpoint: Mapping[str, Any],
    state_key: str,
) -> Iterator[None]:
    """Give a model the shapes of a checkpoint, in a ``with`` block before its weights are loaded.

    Within the block the model has its dense shapes. When the block ends it is shrunk by the checkpoint's plan,
    if there is one.

    Args:
        network: The network of the callback, which then has the plan of the checkpoint, and no masks yet.
        model: The model whose weights will be loaded.
        averages: Weight averages outside the model; their shapes change in the same way.
        checkpoint: The checkpoint, with the plan of a smaller network or without one.
        state_key: Key of the callback's state in the checkpoint.

    Raises:
        ValueError: If weights or plan do not fit the model, which then has the shapes it had before.
    """
    before = network.plan if network.model is model else None
    if before is not None:
        expand_(model, before, averages=averages)
    try:
        yield
        # a strategy that divides the model has loaded its weights by now, and removed them
        weights = compacted.weights_in(checkpoint) if "state_dict" in checkpoint else {}
        plan = compacted.plan_in(checkpoint, state_key)
        compacted.check_shapes(model, weights, compacted.plans_in(checkpoint))
        if plan is not None:
            compacted.check_weights(model, weights, [plan], getattr(model, "strict_loading", True))
    except BaseException:
        if before is not None:
            replay_(model, before, averages=averages)
        raise
    if plan is not None:
        replay_(model, plan, averages=averages)
    if before is not None or plan is not None:
        network.reset()
    if plan is not None:
        network.model, network.plan = model, plan
