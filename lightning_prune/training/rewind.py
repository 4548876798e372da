"""Rewind: the setting that restores an earlier point in training after each pruning event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.core.averages import averaged_modules
from lightning_prune.core.parts import Part, check_flag, check_seed
from lightning_prune.schedules.moments import Moment
from lightning_prune.training.snapshots import (
    TrainingObjects,
    not_reinitialized,
    reinitialize_,
    restore_snapshot_,
    take_snapshot,
)

_RANDOM = "random"


@dataclass(frozen=True, repr=False)
class Rewind(Part):
    """Restores an earlier point in training after each pruning event, so that training is repeated from there.

    - Weight rewinding, the default: parameters, buffers, optimizers (their momentum, too) and learning-rate
      schedules are restored. From the initialization it is the lottery ticket of Frankle and Carbin 2019, arXiv
      1803.03635; from a point soon after, Frankle et al. 2019, "Stabilizing the Lottery Ticket Hypothesis",
      arXiv 1903.01611.
    - Learning-rate rewinding, ``weights=False``: optimizers (their momentum, too) and learning-rate schedules
      are restored; weights and buffers stay. Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural
      Network Pruning", arXiv 2003.02389.
    - Training from scratch, ``to="random"``: weights are reinitialized, to the same values at each event;
      optimizers and learning-rate schedules are restored to the state before the first batch. Liu et al. 2019,
      "Rethinking the Value of Network Pruning", arXiv 1810.05270.

    Counts of epochs and steps are not restored: a fit must be long enough to repeat training after its last
    event.

    Args:
        to: The moment to restore, not after the first event that removes something; "0ep" is before the first
            batch. Or "random".
        weights: Whether weights and buffers are restored, too.
        seed: Seed of the random weights; the random state of the run does not change.

    Raises:
        ValueError: If an argument is none of these.
    """

    to: str | float = "0ep"
    weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            _ = self.moment
        except ValueError as error:
            raise ValueError(f'{str(error).removesuffix(".")}; or "{_RANDOM}".') from None
        check_flag(weights=self.weights)
        check_seed(self.seed)
        if self.random and not self.weights:
            raise ValueError(
                f"weights=False keeps the weights that to={self.to!r} draws anew: leave one of them out."
            )

    @property
    def random(self) -> bool:
        """Whether weights are reinitialized at random."""
        return self.to == _RANDOM

    @property
    def moment(self) -> Moment:
        """The moment of the snapshot; for random weights before the first batch, as optimizers start anew."""
        return Moment.parse("0ep" if self.random else self.to, "to")

    def check(self, model: nn.Module) -> None:
        """Check that the weights of a model can be reinitialized, if ``to="random"``.

        Raises:
            ValueError: If no module reinitializes a parameter, or the model holds an average of its weights.
        """
        if not self.random:
            return
        if averages := averaged_modules(model):
            raise ValueError(
                f"to={self.to!r} draws weights anew, of which {' and '.join(averages)} would still average"
                " earlier ones: take one or the other."
            )
        if left := not_reinitialized(model, self.seed):
            raise ValueError(
                f"to={self.to!r} cannot redraw {', '.join(map(repr, left))}: the module that holds it, or one"
                " around it, needs a reset_parameters method."
            )

    def take(self, training: TrainingObjects) -> dict[str, Any]:
        """Return the snapshot for :meth:`apply_`: plain values and tensors."""
        return take_snapshot(training, weights=self.weights and not self.random)

    def apply_(self, training: TrainingObjects, snapshot: Mapping[str, Any]) -> None:
        """Restore the snapshot in place, and reinitialize random weights; enforce the masks afterwards."""
        restore_snapshot_(training, snapshot)
        if self.random:
            reinitialize_(training.model, self.seed)
