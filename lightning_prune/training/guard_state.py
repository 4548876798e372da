"""How pruning fares under a guard: the dense metric, the last good round, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.core.schema import fraction, integer, number, optional, record, sequence, string
from lightning_prune.pruner import Pruner
from lightning_prune.training.guard import Guard
from lightning_prune.training.snapshots import (
    OPTIMIZERS,
    WEIGHTS,
    TrainingObjects,
    check_snapshot,
    optimizer_memory,
    restore_optimizer_,
    restore_weights_,
    weights_of,
)
from lightning_prune.units.masks import MASKS, MaskStore

_GOOD = record(
    {
        "weights": WEIGHTS,
        "optimizers": OPTIMIZERS,
        "masks": MASKS,
        "protected": sequence(string),
        "reached": fraction,
    }
)
_UNSEEN: dict[str, Any] = {"reached": 0.0, "decisions": (), "dense": None, "bad": 0, "good": None}
GUARD_STATE = record(
    {
        "reached": fraction,
        "decisions": sequence(string),
        "dense": optional(number()),
        "bad": integer(),
        "good": optional(_GOOD),
    },
    before=_UNSEEN,
)


class GuardState:
    """Judges rounds by a guard, and remembers the last good one.

    Attributes:
        reached: Share of the target that is gone.
        bad: Bad rounds in a row so far.
        decisions: In words, in order.
    """

    def __init__(self) -> None:
        self.reached = 0.0
        self.decisions: list[str] = []
        self._dense: float | None = None
        self.bad = 0
        self._good: dict[str, Any] | None = None

    @property
    def running(self) -> bool:
        """Whether there is a network to go back to."""
        return self._good is not None

    @property
    def informed(self) -> bool:
        """Whether the dense metric is known."""
        return self._dense is not None

    def forget_metric(self) -> None:
        """The dense metric is of no use: another one is looked at."""
        self._dense = None

    def begin(self, dense: float, training: TrainingObjects, pruner: Pruner) -> None:
        """Before the first event: the network as it is will do."""
        if self._dense is None:
            self._dense = dense
        self._keep(training, pruner)

    def good(self, guard: Guard, metric: float | None) -> bool:
        """Whether a round with this metric is good; one that was not measured is not."""
        return metric is not None and self._dense is not None and guard.allows(self._dense, metric)

    def judge(
        self,
        guard: Guard,
        place: str,
        metric: float,
        wanted: float | None,
        training: TrainingObjects,
        pruner: Pruner,
    ) -> float | None:
        """Ends a round.

        Args:
            guard: The rule.
            place: Where training is, in words.
            metric: That of the round.
            wanted: Share of the target that is to be gone after the next event; ``None`` at the end.
            training: Is kept, or goes back to the last good round.
            pruner: Of the same network.

        Returns:
            The share that the next event may take; ``None`` if the network went back.
        """
        assert self._dense is not None
        found = f"{place}: {guard.compare(self._dense, metric)}"
        if self.good(guard, metric):
            self.bad = 0
            self._keep(training, pruner)
            self.decisions.append(f"{found}: {_percent(pruner.sparsity)} removed are good enough")
            return self.reached if wanted is None else wanted
        self.bad += 1
        if wanted is None or self.bad > guard.patience:
            self._go_back(training, pruner)
            self.decisions.append(f"{found}: back to {_percent(pruner.sparsity)} removed, no further pruning")
            return None
        half = self.reached + (wanted - self.reached) / 2
        self.decisions.append(f"{found}: half a step, to {_percent(half)} of the target")
        return half

    def end(self) -> None:
        """There is no going back any more."""
        self._good = None

    def _keep(self, training: TrainingObjects, pruner: Pruner) -> None:
        self._good = {
            "weights": weights_of(training.model),
            "optimizers": [optimizer_memory(optimizer) for optimizer in training.optimizers],
            "masks": pruner.store.state_dict(),
            "protected": sorted(pruner.protected),
            "reached": self.reached,
        }

    def _go_back(self, training: TrainingObjects, pruner: Pruner) -> None:
        assert self._good is not None
        restore_weights_(training.model, self._good["weights"])
        for optimizer, memory in zip(training.optimizers, self._good["optimizers"], strict=True):
            restore_optimizer_(optimizer, memory)
        pruner.store.go_back_(self._good["masks"])
        pruner.protected = set(self._good["protected"])
        self.reached = self._good["reached"]
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "reached": self.reached,
            "decisions": list(self.decisions),
            "dense": self._dense,
            "bad": self.bad,
            "good": self._good,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state, as ``JUDGE`` reads it."""
        self.reached = state["reached"]
        self.decisions = list(state["decisions"])
        self._dense = state["dense"]
        self.bad = state["bad"]
        self._good = state["good"]


def check_good(good: Mapping[str, Any], training: TrainingObjects, what: str) -> None:
    """Makes sure that a network to go back to, out of a saved state, is one of this training.

    Raises:
        ValueError: If not.
    """
    check_snapshot(good, training, what)
    MaskStore(training.model, ()).unpacked(good["masks"])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
