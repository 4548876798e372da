"""Iterative pruning over several fits: each removes more and trains on, until a metric drops too far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_prune.callbacks.lone_callback import only_callback, validated
from lightning_prune.callbacks.pruning import PruningCallback
from lightning_prune.core.parts import check_part, is_number
from lightning_prune.training.guard import Guard
from lightning_prune.training.lightning_packages import (
    LightningDataModule,
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)


@dataclass(frozen=True)
class Round:
    """One round of :func:`prune_to_goal`: a fit with a target.

    Args:
        target: The target of its PruningCallback.
        sparsity: Removed share of the elements that the structure covers, after it.
        metric: The guard's metric, validated after it.
        good: Whether the guard allows the metric.
    """

    target: float
    sparsity: float
    metric: float
    good: bool


@dataclass(frozen=True)
class GoalResult:
    """What :func:`prune_to_goal` has done.

    Args:
        rounds: All rounds, in order.
        dense: The metric before the first round.
        trainer: The Trainer of the last good round, to save a checkpoint with; ``None`` if no round was good.
        callback: Its PruningCallback, with masks and report; ``None`` if no round was good.
    """

    rounds: tuple[Round, ...]
    dense: float
    trainer: Trainer | None
    callback: PruningCallback | None


def prune_to_goal(
    make_trainer: Callable[[float], Trainer],
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    targets: Sequence[float],
    guard: Guard,
) -> GoalResult:
    """Prune and train in rounds, until the last target is reached or a metric drops too far.

    Each round is a fit of its own, with optimizers and learning rates of its own: what the earlier rounds have
    removed stays removed, and its PruningCallback removes more, up to its target. After each round, and before
    the first one, the network is validated. If the metric is worse than the dense one by more than the guard
    allows, weights and masks of the last good round are restored. Then ``guard.patience`` further rounds are
    tried, each with a target half way between the last good and the first bad one. Iterative magnitude pruning
    is Han et al. 2015, "Learning both Weights and Connections", NeurIPS; the rule for when to stop is ours.

    A ``Guard`` in a PruningCallback judges the events of one fit by the same rule; here whole fits are judged.

    Args:
        make_trainer: Is given the target of a round, and returns a new Trainer with one PruningCallback of this
            target, in one process, with ``compact=False`` and no ``horizon``.
        model: The trained module, which is changed in place: in the end it is that of the last good round.
        datamodule: Provides the data, if the module does not.
        targets: The targets of the rounds, rising, each in (0, 1): shares of the whole network, not of what an
            earlier round has left. To remove a fifth of what is left in each round:
            ``[1 - 0.8**n for n in range(1, 11)]``.
        guard: The metric, and how much worse than the dense one it may be. Validation has to log it.

    Returns:
        The rounds, and Trainer and callback of the last good one.

    Raises:
        ValueError: If an argument is wrong, a Trainer does not suit, or validation does not log the metric.
    """
    check_part(guard, Guard, "guard")
    _check_targets(targets)
    search = _Search(tuple(targets), guard.patience)
    rounds: list[Round] = []
    dense: float | None = None
    good: tuple[Trainer, PruningCallback] | None = None
    weights, state = copy.deepcopy(model.state_dict()), None
    for target in search:
        trainer = make_trainer(target)
        callback = _callback_of(trainer, model, target)
        if dense is None:
            dense = _metric(trainer, model, datamodule, guard)
        if state is not None:
            callback.load_state_dict(state)
        trainer.fit(model, datamodule=datamodule)
        value = _metric(trainer, model, datamodule, guard)
        rounds.append(Round(target, callback.sparsity, value, guard.allows(dense, value)))
        search.good = rounds[-1].good
        if search.good:
            good = trainer, callback
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(callback.state_dict())
        else:
            model.load_state_dict(weights)
        say = rank_zero_info if search.good else rank_zero_warn
        then = "good enough" if search.good else f"back to target={search.low:.4g}"
        say(f"Round {len(rounds)}, target={target:.4g}: {guard.compare(dense, value)}: {then}")
    assert dense is not None
    return GoalResult(tuple(rounds), dense, *(good or (None, None)))


class _Search:
    """The targets to try: the given ones up to the first bad one, then some half way below that.

    Args:
        targets: Rising targets.
        patience: How many are tried half way.

    Attributes:
        good: Whether the last target was good; to be set after each.
        low: The largest target that was good; 0 before the first one.
    """

    def __init__(self, targets: Sequence[float], patience: int) -> None:
        self._targets, self._patience = targets, patience
        self.good = True
        self.low = 0.0

    def __iter__(self) -> Iterator[float]:
        for target in self._targets:
            yield target
            if not self.good:
                yield from self._half_way(target)
                return
            self.low = target

    def _half_way(self, high: float) -> Iterator[float]:
        for _ in range(self._patience):
            target = (self.low + high) / 2
            yield target
            self.low, high = (target, high) if self.good else (self.low, target)


def _check_targets(targets: Any) -> None:
    """Raise ValueError if targets are not rising numbers in (0, 1)."""
    listed = isinstance(targets, Sequence) and not isinstance(targets, str) and len(targets) > 0
    if not listed or not all(is_number(each) and 0 < each < 1 for each in targets):
        raise ValueError(f"targets={targets!r} must be a list of numbers in (0, 1).")
    if any(one >= other for one, other in pairwise(targets)):
        raise ValueError(f"targets={targets!r} must rise: each is a share of the whole network.")


def _callback_of(trainer: Trainer, model: LightningModule, target: float) -> PruningCallback:
    """Return the PruningCallback of a round's Trainer.

    Raises:
        ValueError: If the Trainer or the callback does not suit.
    """
    callback = only_callback(trainer, model, "prune_to_goal")
    if callback.target != target:
        raise ValueError(
            f"make_trainer({target!r}) has returned a Trainer whose PruningCallback has"
            f" target={callback.target!r}: give it the target that make_trainer is given."
        )
    if trainer.global_step or callback.masks:
        raise ValueError(
            f"make_trainer({target!r}) has returned a Trainer or a PruningCallback that has run before: make"
            " new ones in each call."
        )
    if callback.compact:
        raise ValueError(
            f"compact={callback.compact!r} ends pruning after the first round: leave it out, and call"
            " compact(model, result.callback.masks, example) in the end."
        )
    if callback.horizon is not None:
        raise ValueError(f"horizon={callback.horizon!r} is for fits along one plan: leave it out in rounds.")
    return callback


def _metric(
    trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None, guard: Guard
) -> float:
    """Return the guard's metric, as validation gives it.

    Raises:
        ValueError: If validation does not log it.
    """
    found = validated(trainer, model, datamodule)
    if guard.monitor not in found:
        raise ValueError(
            f"monitor={guard.monitor!r} must be one that validation logs:"
            f" {', '.join(sorted(found)) or 'none is'}."
        )
    return found[guard.monitor]
