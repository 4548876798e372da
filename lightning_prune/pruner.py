"""Pruner: the pruning pipeline for any training loop: observe, score, select, mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_part
from lightning_prune.core.probes import example_for
from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import Magnitude
from lightning_prune.schedules.base import Schedule
from lightning_prune.schedules.curves import Cubic
from lightning_prune.selectors.acceptance import accepted_units
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.by_score import Global
from lightning_prune.selectors.pruned_state import PrunedState
from lightning_prune.selectors.scoring import Scoring
from lightning_prune.selectors.targets import Target, divided, resolved
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.input_hooks import layer_inputs
from lightning_prune.statistics.losses import Losses
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.layer_matrices import named_matrices
from lightning_prune.statistics.reconstruction.network_fit import check_batches, reconstruct_
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.structures.base import Structure
from lightning_prune.structures.untouched import touchable_units
from lightning_prune.structures.weights import Unstructured
from lightning_prune.units.given_masks import GivenMasks, MaskSource
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.shards import shards_of

_EXAMPLE_OF_SHARDS = (
    "{!r} with {!r} follows an example through the model, whose parameters are divided among processes: take"
    " Unstructured() with budget='units', or keep the model whole, as with DDP."
)


def check_parts(criterion: Criterion, structure: Structure, selector: Selector) -> None:
    """Raise ValueError if a part is of the wrong kind."""
    check_part(criterion, Criterion, "criterion")
    check_part(structure, Structure, "structure")
    check_part(selector, Selector, "selector")


class Pruner(PrunedState):
    """Prunes a model in a training loop of your own.

    If ``fully_shard`` has divided the parameters among processes, masks are divided in the same way, and each
    process works on its own rows. All processes must make the same calls, :attr:`sparsity` and
    :meth:`state_dict` included.

    Weights that require no gradient stay, unless the structure's ``include`` names them or no weight does.

    Args:
        model: The module to prune, in place. Its parameters stay the same objects.
        target: Share of the units that is removed at the end, in (0, 1); ``None`` if the selector decides. Or
            pattern of names, as for ``include``, to the share of its units: the first that matches counts.
        criterion: Scores how much a unit matters.
        structure: Which weights are removed together.
        selector: Which units are removed.
        schedule: How much is removed, and when; its moments must be shares of the fit. ``None`` if only
            :meth:`prune` is called.
        example: What ``forward`` is called with, if structure or selector needs it: a tensor, a tuple of
            arguments or a mapping of keyword arguments; or a list of several of these, to run all of the model.
            By default the ``example_input_array`` of a LightningModule.
        masks: What is removed from the start, as :class:`GivenMasks` describes it; :meth:`apply_` sets it to 0.
            With ``target=None`` nothing else is removed, unless the selector decides.

    Attributes:
        groups: The unit groups that may be pruned.
        frozen: Name to reason of what cannot be pruned.
        parts: Names of the modules that were followed alone; empty if the whole model was.
        protected: Names of the groups of which more would have been removed, and that keep as few as they may.
        store: The masks, and the methods that enforce them.
        needs: What training must offer.
        unreconstructed: Name of each matrix that the last reconstruction left as it was, to the reason.

    Raises:
        ValueError: If an argument is wrong, or there is nothing to prune.

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
        target: Target = None,
        *,
        criterion: Criterion = Magnitude(),
        structure: Structure = Unstructured(),
        selector: Selector = Global(),
        schedule: Schedule | None = Cubic(),
        example: Any = None,
        masks: GivenMasks | MaskSource | None = None,
    ) -> None:
        check_parts(criterion, structure, selector)
        given = GivenMasks.of(masks)
        shares = resolved(target, selector, optional=given is not None)
        if selector.pattern is not None:
            criterion = criterion.for_pattern(*selector.pattern)
        if schedule is not None:
            check_part(schedule, Schedule, "schedule")
            schedule(0.0)
        self._model, self._criterion, self._selector, self._schedule = model, criterion, selector, schedule
        shards = shards_of(model)
        needs_example = structure.needs_example or selector.needs_example
        if needs_example and shards.sharded:
            raise ValueError(_EXAMPLE_OF_SHARDS.format(structure, selector))
        structure.keep_copies_apart(model)
        example = example_for(model, example) if needs_example else None
        found = touchable_units(structure.units(model, example), model, repr(structure))
        watches = Needs.ACTIVATION in criterion.needs
        layers = {group.name: layer_inputs(model, group) if watches else [] for group in found.groups}
        matrices = {name: matrix for name, (_, matrix) in named_matrices(model).items()}
        units = accepted_units(found, criterion, selector, shards, layers, matrices)
        if shares:
            units, self.latency_table = selector.measured(units, model, example)
        units, self._quotas = divided(units, model, target, shares)
        self.groups, self.frozen, self.parts = units.groups, units.reasons(model), units.parts
        self.protected: set[str] = set()
        self.unreconstructed: dict[str, str] = {}
        self._reached = 0.0  # largest share of the target that was pruned to
        self._left_dense: dict[str, str] = {}  # group to reason: not observed by the last event
        for quota in self._quotas:
            quota.check(selector, criterion)
        masked = dict.fromkeys(part.name for group in self.groups for part in group.masked)
        self.store = MaskStore(model, masked, shards)
        self._given = {}
        self.needs = criterion.needs | selector.needs
        self._scoring = Scoring(
            model, criterion, selector, [(each, layers[each.name]) for each in self.groups], self.store
        )
        self.load_masks(given or GivenMasks({}))

    @contextmanager
    def watch(self, batch: int = 0, scale: float = 1.0) -> Iterator[None]:
        """Observe activations in a ``with`` block around the forward and backward passes of one training step.

        A forward pass alone is enough for criteria that need no gradients of activations, such as ``Wanda``. In
        a block with a backward pass only those forward passes count that a gradient comes back through, not
        those of a teacher. The model has hooks within the block only. A step with inf or nan in an activation
        or its gradient, or with an error, is left out. Nothing happens if the criterion needs no activations.

        Args:
            batch: Number of the batch. One that is not a multiple of the criterion's ``every`` is observed only
                while nothing was observed since the last event.
            scale: Factor by which the loss, and so its gradients, are scaled.
        """
        hooks = self.observations.input_hooks()
        with nullcontext() if hooks is None else hooks.observe_batch(batch, lambda: scale, forward_alone=True):
            yield
        if hooks is not None:
            hooks.end_step()

    @torch.no_grad()
    def observe(self, grads: Mapping[str, Tensor] | None = None) -> None:
        """Add the gradients of one training step to the statistics, after backward.

        Gradients must be accumulated over micro-batches, unscaled and not clipped. A step with inf or nan in
        one of them is left out and counted.

        Args:
            grads: Parameter name to gradient. By default the ``.grad`` of each parameter is observed, and the
                criterion's penalty is then added to it, if there is one. A weight without a gradient counts as
                zeros if others of its group have one; a group without any is not observed.
        """
        if Needs.GRADIENT in self._criterion.needs:
            self.observations.add(grads)
        if grads is None:
            self.penalize_(part.weight for group in self.observations.groups for part in group.slices)

    @torch.no_grad()
    def penalize_(self, parameters: Iterable[Tensor], scale: float = 1.0) -> None:
        """Add the criterion's penalty to the gradients of some parameters.

        Args:
            parameters: The parameters.
            scale: Factor by which the loss, and so its gradients, are scaled.
        """
        named = self.store.named(parameters)
        for group in self.observations.groups:
            for name, penalty in self._criterion.penalty(group).items():
                grad = named[name].grad if name in named else None
                if grad is not None:
                    grad.add_(penalty, alpha=scale)

    def step(
        self,
        progress: float,
        *optimizers: Optimizer,
        losses: Losses | None = None,
        reconstruct: Reconstruct | None = None,
        batches: Calibration | Sequence[Any] = (),
    ) -> None:
        """Prune to the share of the target that the schedule gives, before training goes on.

        Args:
            progress: Position in training, in [0, 1] of the fit; 1 prunes to the target now.
            optimizers: Optimizers whose state of masked weights is set to 0.
            losses: For criteria and selectors that evaluate the loss.
            reconstruct: As for :meth:`prune`.
            batches: As for :meth:`prune`.

        Raises:
            ValueError: If ``progress`` is outside [0, 1].
        """
        if self._schedule is None:
            raise ValueError("step() needs a schedule; without one, call prune().")
        fraction = self._schedule(progress)
        self.prune(fraction, *optimizers, losses=losses, reconstruct=reconstruct, batches=batches)

    @torch.no_grad()
    def prune(
        self,
        fraction: float,
        *optimizers: Optimizer,
        losses: Losses | None = None,
        reconstruct: Reconstruct | None = None,
        batches: Calibration | Sequence[Any] = (),
    ) -> None:
        """Prune to a share of the target: score, select, mask, reconstruct. Masked weights stay masked.

        Args:
            fraction: Share of the target, in [0, 1].
            optimizers: Optimizers whose state of masked weights is set to 0.
            losses: For criteria and selectors that evaluate the loss.
            reconstruct: How the weights that are left make up for those that went; ``None`` leaves them alone.
            batches: Calibration batches, for ``reconstruct`` and criteria that look at inputs of layers. For
                each, what ``forward`` is given: a tensor, a tuple of its arguments or a mapping of keyword
                arguments.

        Raises:
            ValueError: If ``fraction`` is outside [0, 1], the loss would be evaluated too often, or there is no
                batch to reconstruct on.
            RuntimeError: If there is nothing to score yet.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction!r} must lie in [0, 1].")
        if fraction == 0 or (fraction <= self._reached and not self.ready):
            return  # there is nothing to remove, or no need of scores to remove no more
        check_part(reconstruct, Reconstruct, "reconstruct", optional=True)
        calibration = Calibration.of(batches)
        if reconstruct is None:
            self.select(fraction, losses, calibration)
            self.store.apply_()
        else:
            check_batches(calibration)
            with self._restored_after_error() as before:
                self.select(fraction, losses, calibration)
                changes = not self.store.enforced
                self.store.apply_()
                if changes:
                    left = reconstruct_(self._model, before, self.masks, calibration, reconstruct)
                    self.unreconstructed = left
        for optimizer in optimizers:
            self.store.apply_to_state_(optimizer)
        self.observations.reset_()
        self._reached = max(self._reached, fraction)

    @contextmanager
    def _restored_after_error(self) -> Iterator[nn.Module]:
        """Yield a copy of the model; an error in the block restores weights and masks."""
        before, masks = copy_model(self._model), {name: mask.clone() for name, mask in self.masks.items()}
        try:
            yield before
        except BaseException:
            for name, mask in masks.items():
                self.masks[name].copy_(mask)
            for parameter, earlier in zip(self._model.parameters(), before.parameters(), strict=True):
                parameter.copy_(earlier)
            raise

    @torch.no_grad()
    def select(
        self, fraction: float, losses: Losses | None = None, batches: Calibration | Sequence[Any] = ()
    ) -> None:
        """Update the masks as :meth:`prune` does; weights stay as they are."""
        if not self._quotas:
            return
        scoring = self._scoring
        if losses is None and Needs.LOSS in self._selector.needs:
            raise scoring.nothing_seen(self._selector.needs)
        evaluator = scoring.evaluator(losses, self.needs)
        candidates = scoring.candidates(evaluator, Calibration.of(batches))
        self._left_dense = scoring.left_dense()
        kept = scoring.kept() | {each.group.name: each.kept for each in candidates}

        def loss() -> float:
            assert evaluator is not None
            evaluator.set_kept(self.groups, kept)
            return float(evaluator.loss(self._selector.held))

        for quota in self._quotas:
            quota.select(self._selector, candidates, fraction, kept, loss)
        for each in candidates:
            if not each.group.divisible:  # for single weights each.kept is the mask itself
                self.store.keep(each.group, each.kept)
        self.protected |= {each.group.name for each in candidates if each.protected}

    def estimate_seconds(self, losses: Losses) -> float:
        """Evaluate the loss on one batch, before pruning depends on it.

        Returns:
            Estimated seconds of loss evaluations in an event.

        Raises:
            ValueError: If an event would take more forward passes than the criterion allows.
        """
        return self._scoring.estimate_seconds(losses)

    def apply_(self) -> None:
        """Set each masked weight to exactly 0, after the optimizer's step."""
        self.store.apply_()

    @torch.no_grad()
    def scores(
        self, losses: Losses | None = None, batches: Calibration | Sequence[Any] = ()
    ) -> dict[str, Tensor]:
        """Return the criterion's scores of the units.

        Args:
            losses: For criteria that evaluate the loss.
            batches: For criteria that look at the inputs of layers, as for :meth:`prune`.

        Returns:
            Group name to one number per unit, higher = keep; -inf for units that are removed.

        Raises:
            RuntimeError: If there is nothing to score yet.
        """
        evaluator = self._scoring.evaluator(losses, self._criterion.needs)
        candidates = self._scoring.candidates(evaluator, Calibration.of(batches))
        return {each.group.name: each.scores() for each in candidates}
