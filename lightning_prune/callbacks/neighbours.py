"""What else a Trainer may hold beside a pruning callback: other ones, and callbacks that average weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune.training import trainer_queries
from lightning_prune.training.lightning_packages import LightningModule, Trainer
from lightning_prune.training.parts import PruningParts
from lightning_prune.training.pruned_network import PrunedNetwork


def check_neighbours(
    parts: PruningParts,
    network: PrunedNetwork,
    neighbours: Sequence[PrunedNetwork],
    trainer: Trainer,
    module: LightningModule,
) -> None:
    """Check that a pruning callback can work beside the other callbacks of its Trainer.

    Args:
        parts: The arguments of the callback.
        network: Its network.
        neighbours: The networks of the Trainer's other pruning callbacks.
        trainer: The Trainer.
        module: The module that the Trainer runs.

    Raises:
        ValueError: If it cannot; the message says what to do instead.
    """
    if parts.restores_weights and trainer_queries.averages_in_callbacks(trainer, module):
        raise ValueError(
            "rewind and guard bring back weights, which an averaging callback would go on to average with"
            " those that were given up: take one or the other."
        )
    for other in neighbours:
        shared = sorted(network.covered & other.covered)
        if shared and other.model is network.model:
            raise ValueError(
                f"two PruningCallbacks prune {shared[0]!r}: give them include and exclude patterns"
                " that keep them apart."
            )
    if neighbours and parts.restores_weights:
        raise ValueError(
            "rewind and guard bring back weights, also those that another callback has removed: they are"
            " for a single PruningCallback. Give it a target by pattern, target={'a*': 0.5, 'b*': 0.3}, or"
            " prune in one fit after the other, in the second with masks=one.masks."
        )
    if neighbours and parts.compact:
        raise ValueError(
            f"compact={parts.compact!r} is for a single PruningCallback: with several, call"
            " compact(model, [one.masks, other.masks], example) after the fit."
        )
