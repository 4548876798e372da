"""The pipeline, free of any framework: observe, score, select, mask. One page, usable in a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core.parts import check_part
from lightning_prune.core.schema import integer, mapping, none, read, record, sequence, string
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.schedules import Cubic, Schedule
from lightning_prune.selectors import Global, Selector
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.input_hooks import InputHooks, layer_inputs
from lightning_prune.statistics.losses import Losses, LossEvaluator
from lightning_prune.statistics.observations import Observations
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.sums import STATISTICS
from lightning_prune.structures import Structure, Unstructured
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MASKS, MaskStore
from lightning_prune.units.shards import Shards, shards_of, to_local
from lightning_prune.units.slices import axis_slices

PRUNED = record(
    {
        "masks": MASKS,
        "plan": none,
        "frozen": mapping(string),
        "protected": sequence(string),
        "left_out": integer(),
        "criterion": string,
        "statistics": mapping(STATISTICS),
    },
    before={"frozen": {}, "criterion": ""},  # the first is for a report alone; the other one is not known
)


def check_parts(target: float | None, criterion: Criterion, structure: Structure, selector: Selector) -> None:
    """Raises ValueError if a part is of the wrong kind, or the selector cannot work with the target."""
    check_part(criterion, Criterion, "criterion")
    check_part(structure, Structure, "structure")
    check_part(selector, Selector, "selector")
    selector.resolve(target)


class Pruner:
    """Prunes a model in a training loop of your own.

    Where ``fully_shard`` has divided the parameters among processes, masks are divided with them, and each
    process works on its own rows. All of them have to make the same calls, :attr:`sparsity` and
    :meth:`state_dict` included.

    Args:
        model: The module to prune, in place. Its parameters stay the ones they are.
        target: Share of the units to be gone at the end, in (0, 1); ``None`` where the selector decides.
        criterion: How much a unit matters.
        structure: What lives or dies together.
        selector: Which units go.
        schedule: How much, and when; its moments must be shares of the fit. ``None`` if only
            :meth:`prune` is called.
        example: A tensor, or a tuple of ``forward``'s arguments, for structures that need one.

    Attributes:
        groups: What may be pruned.
        frozen: What stays as it is, with the reason.
        protected: Names of groups that would have been emptied, and keep a last unit.

    Raises:
        ValueError: If an argument is wrong, or there is nothing that it could prune.

    >>> model = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> pruner = Pruner(model, 0.5, schedule=Cubic(start="0%", end="50%"))
    >>> for step in range(100):
    ...     pruner.step(step / 100)
    ...     optimizer.zero_grad()
    ...     model(torch.ones(1, 10)).sum().backward()
    ...     pruner.observe()
    ...     _ = optimizer.step()
    ...     pruner.apply_()
    >>> int((model.weight == 0).sum())
    50
    """

    def __init__(
        self,
        model: nn.Module,
        target: float | None = None,
        *,
        criterion: Criterion = Magnitude(),
        structure: Structure = Unstructured(),
        selector: Selector = Global(),
        schedule: Schedule | None = Cubic(),
        example: Any = None,
    ) -> None:
        check_parts(target, criterion, structure, selector)
        if schedule is not None:
            check_part(schedule, Schedule, "schedule")
            schedule(0.0)
        self._model = model
        self._share = selector.resolve(target)
        self._criterion = criterion
        self._selector = selector
        self._schedule = schedule
        shards = shards_of(model)
        wanted = structure.needs_example or selector.needs_example
        if wanted and shards.sharded:
            raise ValueError(
                f"{structure!r} with {selector!r} follows an example through the model, whose parameters are"
                " divided among processes: take Unstructured() with budget='units', or keep the model whole, as"
                " with DDP."
            )
        found = structure.units(model, example if wanted else None)
        looks = Needs.ACTIVATION in criterion.needs
        self._layers = {group.name: layer_inputs(model, group) if looks else [] for group in found.groups}
        units = found.accepted(lambda group: self._refuses(group, shards), f"{criterion!r} with {selector!r}")
        self.groups, self.frozen, self._budgets = units.groups, units.frozen, units.budgets
        self.protected: set[str] = set()
        self._left: dict[str, str] = {}  # dense, as nothing was seen of them when they could have been pruned
        self._check_groups(target)
        selector.check(self._share, units)
        self._store = MaskStore(
            model, dict.fromkeys(part.name for group in self.groups for part in group.masked), shards
        )
        seen = [(group, self._layers[group.name]) for group in self.groups]
        self._seen = Observations(criterion, seen, shards)

    def _refuses(self, group: UnitGroup, shards: Shards) -> str | None:
        why = self._selector.refuses(group) or self._criterion.refuses(group)
        if why is None and shards.sharded:
            why = self._refuses_divided(group)
        if why is None and Needs.ACTIVATION in self._criterion.needs and not self._layers[group.name]:
            return f"{self._criterion!r} needs an ungrouped layer that is called on the units"
        return why

    def _refuses_divided(self, group: UnitGroup) -> str | None:
        if any(to_local(part.weight) is part.weight for part in group.slices):
            return "each process has a copy of its own, while other parameters are divided among them"
        alone = self._criterion.pointwise and self._criterion.needs in Needs.GRADIENT
        fits = {
            "structure=Unstructured()": group.divisible,
            "a criterion that scores each weight by itself, such as Magnitude() or Taylor()": alone,
            "selector=Global() or PerLayer()": self._selector.splits(group),
        }
        wanted = [part for part, fit in fits.items() if not fit]
        return f"its rows lie in several processes: take {', '.join(wanted)}" if wanted else None

    def _check_groups(self, target: float | None) -> None:
        units = sum(group.size for group in self.groups)
        if target is not None and round(self._share * units) == 0:
            raise ValueError(f"target={target!r} of {units} units removes none.")
        if all(group.least == group.size for group in self.groups):
            bounds = ", ".join(f"{group.name} at least {group.least} of {group.size}" for group in self.groups)
            raise ValueError(f"no unit can go: {bounds} must stay.")
        trainable = [part.weight.requires_grad for group in self.groups for part in group.slices]
        if Needs.GRADIENT in self._criterion.needs and not any(trainable):
            raise ValueError(
                f"criterion={self._criterion!r} needs gradients, but no prunable parameter has any:"
                " set requires_grad, or choose a criterion that looks at weights."
            )

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Bool masks by parameter name, True where a weight is kept; live, not copies."""
        return self._store.masks

    @property
    def store(self) -> MaskStore:
        """The masks, with what enforces them."""
        return self._store

    @property
    def channel_groups(self) -> tuple[UnitGroup, ...] | None:
        """The groups, if their units can be cut out of the network; ``None`` for single weights and blocks."""
        return self.groups if all(axis_slices(group.slices) for group in self.groups) else None

    @property
    def sparsity(self) -> float:
        """Removed share of the elements that the structure covers."""
        return self._store.removed / sum(mask.numel() for mask in self.masks.values())

    @property
    def needs(self) -> Needs:
        """What training must offer."""
        return self._criterion.needs | self._selector.needs

    @property
    def left_out(self) -> int:
        """How many observations were left out, because a gradient was inf or nan."""
        return self._seen.left_out

    @property
    def remarks(self) -> dict[str, Any]:
        """What a report says beside numbers: plain values."""
        return {
            "frozen": {**self.frozen, **self._left},
            "protected": sorted(self.protected),
            "left_out": self.left_out,
        }

    @property
    def ready(self) -> bool:
        """Whether some group can be scored: criteria of gradients must have seen a step."""
        return self._seen.ready

    @property
    def unseen(self) -> dict[str, bool]:
        """Names of groups that the next event leaves as they are, and whether they train: nothing was seen."""
        return self._seen.unseen

    @contextmanager
    def watch(self, batch: int = 0, scale: float = 1.0) -> Iterator[None]:
        """A ``with`` block for the passes of one training step, in which criteria may see activations.

        Hooks are there within the block alone. With inf or nan anywhere, or after an error, the step is left
        out. Nothing happens where the criterion needs no activations.

        Args:
            batch: Its number. Of those that the criterion's ``every`` does not divide, one is looked at only
                while nothing was seen since the last event.
            scale: What gradients are multiples of: that of the loss.
        """
        inputs = self.input_hooks()
        with nullcontext() if inputs is None else inputs.look(batch, lambda: scale):
            yield
        if inputs is not None:
            inputs.end_step()

    def input_hooks(self) -> InputHooks | None:
        """The same in parts, for micro-batches and steps that a loss scaler may skip."""
        return self._seen.input_hooks()

    @torch.no_grad()
    def observe(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradients of one training step to the statistics, after backward.

        Gradients must be accumulated over micro-batches, unscaled and not clipped. With inf or nan in one
        of them the step is left out and counted.

        Args:
            grads: Parameter name to gradient; by default each parameter's ``.grad``, to which the criterion's
                penalty is added then, if it has one. Groups in which one is missing, and not for being
                frozen, are not observed.
        """
        if Needs.GRADIENT in self._criterion.needs:
            self._seen.add(grads)
        if grads is None:
            self.penalize_(part.weight for group in self.groups for part in group.slices)

    @torch.no_grad()
    def penalize_(self, parameters: Iterable[Tensor], scale: float = 1.0) -> None:
        """Adds the criterion's penalty to gradients.

        Args:
            parameters: Whose gradients.
            scale: What they are multiples of: that of the loss.
        """
        named = self._store.named(parameters)
        for group in self.groups:
            for name, penalty in self._criterion.penalty(group).items():
                grad = named[name].grad if name in named else None
                if grad is not None:
                    grad.add_(penalty, alpha=scale)

    def step(self, progress: float, *optimizers: Optimizer, losses: Losses | None = None) -> None:
        """Prunes to what the schedule says, before training goes on.

        Args:
            progress: Where training is, in [0, 1] of the fit; 1 prunes to the target now.
            optimizers: Their state of masked weights is zeroed.
            losses: For criteria and selectors that ask for the loss.

        Raises:
            ValueError: If ``progress`` is outside [0, 1].
        """
        if self._schedule is None:
            raise ValueError("step() needs a schedule; without one, call prune().")
        self.prune(self._schedule(progress), *optimizers, losses=losses)

    @torch.no_grad()
    def prune(self, fraction: float, *optimizers: Optimizer, losses: Losses | None = None) -> None:
        """Prunes to a share of the target: score, select, mask. Masks only ever grow.

        Args:
            fraction: Of the target, in [0, 1].
            optimizers: Their state of masked weights is zeroed.
            losses: For criteria and selectors that ask for the loss.

        Raises:
            ValueError: If ``fraction`` is outside [0, 1], or the loss would be asked for too often.
            RuntimeError: If there is nothing to score yet.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction!r} must lie in [0, 1].")
        if fraction == 0:
            return
        self.select(fraction, losses)
        self._store.apply_()
        for optimizer in optimizers:
            self._store.apply_to_state_(optimizer)
        self._seen.reset_()

    @torch.no_grad()
    def select(self, fraction: float, losses: Losses | None = None) -> None:
        """Decides what :meth:`prune` would remove, in the masks alone: weights stay as they are."""
        if losses is None and Needs.LOSS in self._selector.needs:
            raise self._unseen(self._selector.needs)
        trial = self._trial(losses, self.needs)
        candidates = self._scorable(trial)
        reason = f"{self._criterion!r} has seen no step of it"
        self._left = {group.name: reason for group in self.groups if self._is_left(group)}
        kept = {group.name: self._kept(group) for group in self.groups}
        kept |= {each.group.name: each.kept for each in candidates}

        def costs(budget: str) -> float:
            if budget == "loss":
                assert trial is not None
                trial.put(self.groups, kept)
                return float(trial.loss(self._selector.held))
            return self._budgets[budget].cost(kept) / self._budgets[budget].total

        self._selector.select(candidates, fraction * self._share, costs)
        for each in candidates:
            for part in each.group.masked:
                if not part.divisible:  # a single weight's unit is its place in the mask
                    self.masks[part.name].logical_and_(part.spread(each.kept))
        self.protected |= {each.group.name for each in candidates if each.protected}

    def rehearse(self, losses: Losses) -> float:
        """Tries the loss on one batch, before much depends on it.

        Returns:
            How many seconds an event is likely to ask for losses.

        Raises:
            ValueError: If it would take more passes through the network than the criterion allows.
        """
        trial = LossEvaluator(self._model, Losses(losses.loss, losses.batches[:1]))
        trial.loss(1)  # the first pass takes longer
        asked = self._criterion.passes(self.groups) * _seconds(
            lambda: self._criterion.rehearse(self.groups, trial)
        )
        self._check_passes(f", about {asked / 60:.3g} minutes here")
        return asked + self._selector.passes(self.groups) * _seconds(lambda: trial.loss(1))

    def _check_passes(self, time_taken: str = "") -> None:
        passes = self._criterion.passes(self.groups)
        if passes > self._criterion.max_passes:
            raise ValueError(
                f"{self._criterion!r} would take {passes:,} passes of a batch through the network in one"
                f" event{time_taken}: raise max_passes={self._criterion.max_passes!r}, leave layers out with"
                " include and exclude, or take another criterion."
            )

    def apply_(self) -> None:
        """Sets each masked weight to exactly 0, after the optimizer's step."""
        self._store.apply_()

    @torch.no_grad()
    def scores(self, losses: Losses | None = None) -> dict[str, Tensor]:
        """What the criterion makes of the units now.

        Args:
            losses: For criteria that ask for the loss.

        Returns:
            Group name to one number a unit, higher = keep; -inf for units that are gone.

        Raises:
            RuntimeError: If there is nothing to score yet.
        """
        return {
            each.group.name: each.scores()
            for each in self._scorable(self._trial(losses, self._criterion.needs))
        }

    def _trial(self, losses: Losses | None, needs: Needs) -> LossEvaluator | None:
        if losses is None or Needs.LOSS not in needs:
            return None
        self._check_passes()
        return LossEvaluator(self._model, losses)

    def _unseen(self, needs: Needs) -> RuntimeError:
        return RuntimeError(
            f"{self._criterion!r} with {self._selector!r} has seen no finite {needs.unseen} before the first"
            " pruning step."
        )

    def _scorable(self, trial: LossEvaluator | None) -> list[Candidates]:
        """Groups that can be scored now; the others wait, and do not count."""
        if trial is not None:
            self._seen.measure({group.name: self._kept(group) for group in self.groups}, trial)
        dtype = reduce(torch.promote_types, (group.dtype for group in self.groups))
        found = [
            Candidates(
                group,
                to_local(self._kept(group)),
                self._criterion,
                self._seen.statistics[group.name],
                dtype,
                self._store.shards,
            )
            for group in self.groups
            if self._seen.seen(group)
        ]
        if not found:
            raise self._unseen(self._criterion.needs)
        return found

    def _is_left(self, group: UnitGroup) -> bool:
        """Whether a group that is whole cannot be scored."""
        if group.name not in self.unseen:
            return False
        gone = torch.tensor(int(to_local(self._kept(group)).logical_not().any()))
        return int(self._store.shards.add_up(gone)) == 0

    def _kept(self, group: UnitGroup) -> Tensor:
        """Which units are still there, read off the masks."""
        part = group.slices[0]
        return part.kept(self.masks[part.name])

    def state_dict(self) -> dict[str, Any]:
        """Masks, statistics and remarks: plain values and tensors."""
        return {
            "masks": self._store.state_dict(),
            "plan": None,
            **self.remarks,
            **self._seen.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes over a saved state, and enforces its masks.

        Returns:
            What could not be taken over, in words: statistics of another criterion, or of other groups.

        Raises:
            ValueError: If it is none, or its masks are not those of this model; nothing has changed then.
        """
        saved = read(state, PRUNED, "the pruner's state")
        self._store.load_state_dict(saved["masks"])
        self._store.apply_()
        self.protected |= set(saved["protected"])
        own = {group.name for group in self.groups}
        self._left = {name: reason for name, reason in saved["frozen"].items() if name in own}
        return self._seen.load_state_dict(saved)


def _seconds(call: Callable[[], Tensor]) -> float:
    """How long it takes to get a number."""
    begun = time.perf_counter()
    float(call())  # which waits for an accelerator
    return time.perf_counter() - begun
