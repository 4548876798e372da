"""Where the surviving weights go after a pruning event: back to an earlier point in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.core.averages import averaged_names
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
    """After each pruning event, what is left goes back to an earlier point in training, which is then repeated.

    - Weight rewinding, the default: parameters, buffers, optimizers and learning-rate schedules go back. To
      the initialisation it is the lottery ticket of Frankle and Carbin 2019, arXiv 1803.03635; to a point soon
      after, Frankle et al. 2019, "Stabilizing the Lottery Ticket Hypothesis", arXiv 1903.01611.
    - Learning-rate rewinding, ``weights=False``: weights and buffers stay, optimizers (their momentum, too) and
      schedules go back. Renda et al. 2020, "Comparing
      Rewinding and Fine-tuning in Neural Network Pruning", arXiv 2003.02389.
    - Training from scratch, ``to="random"``: fresh weights are drawn, the same ones at each event, optimizers
      and schedules start anew. Liu et al. 2019, "Rethinking the Value of Network Pruning", arXiv 1810.05270.

    Epochs and steps are counted on: a fit needs room to repeat training after its last event.

    Args:
        to: A moment not after the first event that removes something: "0ep" is before the first batch. Or
            "random".
        weights: Whether weights and buffers go back, too.
        seed: Of what is drawn; the run's own random state is left alone.

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
        """Whether weights are drawn anew."""
        return self.to == _RANDOM

    @property
    def moment(self) -> Moment:
        """When the snapshot is taken: what is drawn anew starts with optimizers as they were at first."""
        return Moment.parse("0ep" if self.random else self.to, "to")

    def check(self, model: nn.Module) -> None:
        """Makes sure that fresh weights can be drawn, where they are wanted.

        Raises:
            ValueError: If no module redraws a parameter, or there are averages of what is redrawn.
        """
        if self.random and averaged_names(model):
            raise ValueError(
                f"to={self.to!r} draws weights anew, of which {' and '.join(averaged_names(model))} would still"
                " average earlier ones: take one or the other."
            )
        left = not_reinitialized(model, self.seed) if self.random else []
        if left:
            raise ValueError(
                f"to={self.to!r} cannot redraw {', '.join(map(repr, left))}: the module that holds it needs a"
                " reset_parameters method."
            )

    def take(self, training: TrainingObjects) -> dict[str, Any]:
        """What :meth:`apply_` will need: plain values and tensors."""
        return take_snapshot(training, weights=self.weights and not self.random)

    def apply_(self, training: TrainingObjects, snapshot: Mapping[str, Any]) -> None:
        """Goes back, in place; masks must be enforced anew."""
        restore_snapshot_(training, snapshot)
        if self.random:
            reinitialize_(training.model, self.seed)
