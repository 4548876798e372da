"""The state of a Guard in one fit: the dense metric, the last good network, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.core import schema
from lightning_prune.pruner import Pruner
from lightning_prune.report.history import History
from lightning_prune.training import snapshots
from lightning_prune.training.guard import Guard
from lightning_prune.training.lightning_packages import Trainer, rank_zero_info, rank_zero_warn
from lightning_prune.training.trainer_queries import WarnOnce
from lightning_prune.units.masks import MASKS, MaskStore

_GOOD = schema.record(
    {
        "weights": snapshots.WEIGHTS,
        "optimizers": snapshots.OPTIMIZERS,
        "masks": MASKS,
        "protected": schema.sequence(schema.string),
        "reached": schema.fraction,
    }
)
GUARD_STATE = schema.record(
    {
        "reached": schema.fraction,
        "decisions": schema.sequence(schema.string),
        "dense": schema.optional(schema.number()),
        "bad": schema.integer(),
        "good": schema.optional(_GOOD),
    },
    before={"reached": 0.0, "decisions": (), "dense": None, "bad": 0, "good": None},
)
_LOST = (
    ". Checkpoints of this last round hold the network that was pruned further, not the restored one: that is"
    " saved by trainer.save_checkpoint(path), and by a PrunedCheckpoint by itself."
)
_OF_TRAINING = " One that only training steps log needs num_sanity_val_steps=0."


class GuardState:
    """The rounds of one fit, each a pruning event and the training after it, and the last good network.

    Args:
        guard: How much of a metric pruning may cost; ``None`` if there is no limit.
        warn: Prints each warning once per fit.

    Attributes:
        reached: Share of the target that is removed, in [0, 1].
        decisions: The decisions in words, in order.
    """

    def __init__(self, guard: Guard | None, warn: WarnOnce) -> None:
        self._guard = guard
        self._warn = warn
        self.reached = 0.0
        self.decisions: list[str] = []
        self._dense: float | None = None
        self._bad = 0  # rounds in a row
        self._last_good: dict[str, Any] | None = None

    @property
    def running(self) -> bool:
        """Whether a good network is kept to be restored."""
        return self._last_good is not None

    def is_good(self, metric: float | None) -> bool:
        """Return whether a round with this metric is good; True without a guard, or if no round is running."""
        if self._guard is None or not self.running:
            return True
        return metric is not None and self._dense is not None and self._guard.allows(self._dense, metric)

    def check_logged(self, metrics: Mapping[str, Any]) -> None:
        """Raise ValueError if a validation logged metrics, and the monitored one is not among them."""
        if self._guard is not None and metrics and self._guard.monitor not in metrics:
            raise ValueError(
                f"monitor={self._guard.monitor!r} must be one that validation logs: {_names(metrics)}."
                + _OF_TRAINING
            )

    def allowed(
        self,
        fraction: float,
        trainer: Trainer,
        training: snapshots.TrainingObjects,
        pruner: Pruner,
        history: History,
    ) -> float | None:
        """Return the share of the target that an event may remove; ``None`` if an earlier network was restored.

        Args:
            fraction: Share of the target that the schedule asks for.
            trainer: The Trainer of the fit.
            training: The training objects, restored to the last good round if the present one is too bad.
            pruner: The pruner of the same network.
            history: The metrics that were measured.

        Raises:
            ValueError: If the metric was never measured.
        """
        if self._guard is None or fraction == 0:
            return fraction
        if self.running:
            return self._end_round(self._guard, fraction, trainer, training, pruner, history)
        dense = trainer.strategy.broadcast(history.reference)
        if dense is not None:
            self._dense = dense if self._dense is None else self._dense
            self._keep(training, pruner)
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checked = trainer.num_sanity_val_steps > 0 and trainer.enable_validation
            raise ValueError(
                f"monitor={self._guard.monitor!r} was not measured before the first pruning event: start"
                " later, validate earlier, or take one that is logged by then:"
                f" {_names(trainer.callback_metrics)}.{_OF_TRAINING if checked else ''}"
            )
        return fraction

    def finish(
        self, trainer: Trainer, training: snapshots.TrainingObjects, pruner: Pruner, history: History
    ) -> bool:
        """End the last round of a fit.

        Returns:
            Whether an earlier network was restored.
        """
        if self._guard is None or not self.running:
            return False
        self._end_round(self._guard, None, trainer, training, pruner, history)
        return not self.running

    def _end_round(
        self,
        guard: Guard,
        wanted: float | None,
        trainer: Trainer,
        training: snapshots.TrainingObjects,
        pruner: Pruner,
        history: History,
    ) -> float | None:
        """End a round: compare its metric with the dense one, act on it and log the decision.

        Args:
            guard: How much of the metric pruning may cost.
            wanted: Share of the target that the next event asks for; ``None`` at the end of the fit.
            trainer: The Trainer of the fit.
            training: The training objects.
            pruner: The pruner of the same network.
            history: The metrics that were measured.

        Returns:
            Share of the target that the next event may remove; ``None`` if there is no next event.
        """
        metric = trainer.strategy.broadcast(history.measured)
        if metric is None and guard.monitor not in trainer.callback_metrics and trainer.callback_metrics:
            raise ValueError(f"monitor={guard.monitor!r} is not logged: {_names(trainer.callback_metrics)}.")
        if metric is None or self._dense is None:
            self._warn(trainer, f"A round cannot be judged: no {guard.monitor} to compare was measured in it.")
            return wanted
        self._bad = 0 if self.is_good(metric) else self._bad + 1
        if not self._bad:
            self._keep(training, pruner)
            allowed = wanted
            decision = f"{_percent(pruner.sparsity)} removed are good enough"
        elif wanted is None or self._bad > guard.patience:
            self._go_back(training, pruner)
            allowed = None
            decision = f"back to {_percent(pruner.sparsity)} removed, no further pruning"
        else:
            allowed = self.reached + (wanted - self.reached) / 2
            decision = f"half a step, to {_percent(allowed)} of the target"
        self.decisions.append(
            f"epoch {trainer.current_epoch}: {guard.compare(self._dense, metric)}: {decision}"
        )
        say = rank_zero_warn if self._bad else rank_zero_info
        lost = wanted is None and not self.running
        say(self.decisions[-1] + (_LOST if lost else ""))
        return allowed

    def end(self) -> None:
        """Drop the last good network."""
        self._last_good = None

    def _keep(self, training: snapshots.TrainingObjects, pruner: Pruner) -> None:
        self._last_good = {
            "weights": snapshots.weights_of(training.model),
            "optimizers": [snapshots.optimizer_memory(optimizer) for optimizer in training.optimizers],
            "masks": pruner.store.state_dict(),
            "protected": sorted(pruner.protected),
            "reached": self.reached,
        }

    def _go_back(self, training: snapshots.TrainingObjects, pruner: Pruner) -> None:
        good = self._last_good
        assert good is not None
        snapshots.restore_weights_(training.model, good["weights"])
        for optimizer, memory in zip(training.optimizers, good["optimizers"], strict=True):
            snapshots.restore_optimizer_(optimizer, memory)
        pruner.store.restore_(good["masks"])
        pruner.protected = set(good["protected"])
        self.reached = good["reached"]
        self.end()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "reached": self.reached,
            "decisions": list(self.decisions),
            "dense": self._dense,
            "bad": self._bad,
            "good": self._last_good,
        }

    def load_state_dict(self, state: Mapping[str, Any], monitor: str | None) -> None:
        """Load a saved state.

        Args:
            state: The saved state, as ``GUARD_STATE`` reads it.
            monitor: Name of the metric that was monitored when it was saved.
        """
        self.reached = state["reached"]
        self.decisions = list(state["decisions"])
        self._dense = state["dense"]
        self._bad = state["bad"]
        self._last_good = None if self._guard is None else state["good"]
        if self._guard is not None and monitor != self._guard.monitor:
            self._dense = None  # values of two metrics cannot be compared

    def check_state(self, state: Mapping[str, Any], training: snapshots.TrainingObjects, what: str) -> None:
        """Raise ValueError if the last good network in a saved state is not of this training."""
        if self._guard is not None and (good := state["good"]) is not None:
            snapshots.check_snapshot(good, training, what)
            MaskStore(training.model, ()).unpack_state(good["masks"])


def _names(metrics: Mapping[str, Any]) -> str:
    """Return the names of metrics, but for the sparsities that PruningCallbacks log."""
    return ", ".join(sorted(name for name in metrics if not name.startswith("prune/"))) or "none is"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
