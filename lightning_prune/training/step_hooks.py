"""The training steps of one fit: pass gradients and activations to the pruner, enforce masks after each."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

from torch.optim import Optimizer

from lightning_prune.pruner import Pruner
from lightning_prune.schedules.event_queue import EventQueue
from lightning_prune.statistics.observer import Needs
from lightning_prune.training.hooks import GradientCopies, OptimizerHooks, parameters_in, unscaled_gradients
from lightning_prune.training.lightning_packages import LightningModule, Trainer
from lightning_prune.training.trainer_queries import loss_scale, will_step
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore


class StepHooks:
    """Passes gradients and activations of training steps to a pruner until the last event; enforces masks.

    Args:
        pruner: The pruner; ``None`` if nothing more is pruned.
        store: The masks.
        queue: The events of the fit; nothing is observed once it is over.
        optimizers: The optimizers of the module.
    """

    def __init__(
        self, pruner: Pruner | None, store: MaskStore, queue: EventQueue, optimizers: Iterable[Optimizer]
    ) -> None:
        self._pruner = pruner
        self._store = store
        self._queue = queue
        self._optimizer_hooks = OptimizerHooks(store)
        self._copies = GradientCopies([] if pruner is None else _sharing_groups(pruner.groups))
        self._inputs = None if pruner is None else pruner.observations.input_hooks()
        self._observing = ExitStack()
        self.attach(optimizers)

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Add hooks to the optimizers that do not have them yet."""
        self._optimizer_hooks.attach(optimizers)

    def begin_batch(self, trainer: Trainer, batch: int) -> None:
        """Observe activations until the batch ends, if the criterion needs them and samples this batch."""
        if self._inputs is not None and not self._queue.finished:
            # gradients of activations are those of this process's loss; training uses the mean over processes
            self._observing.enter_context(
                self._inputs.observe_batch(batch, lambda: loss_scale(trainer) * trainer.world_size)
            )

    def after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """Copy gradients and mask them, under manual optimization: the user may clip before the next hook."""
        if module.automatic_optimization:
            self._observing.close()  # a closure may run the batch several times
            return
        parameters = list(module.parameters())
        if self._observer(Needs.GRADIENT) is not None:
            self._copies.store(unscaled_gradients(self._store, parameters, loss_scale(trainer)))
        self._store.apply_to_grads_(parameters)

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Observe the unclipped gradients of a step, then zero those of masked weights before clipping."""
        parameters = parameters_in(optimizer)
        unscaled = not getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = 1.0 if unscaled else loss_scale(trainer)
        first = self._optimizer_hooks.first_call(optimizer)
        if (pruner := self._observer(Needs.GRADIENT)) is not None and first:
            if module.automatic_optimization:
                pruner.observe(unscaled_gradients(self._store, parameters, scale))
            else:
                stepping = [parameter for parameter in parameters if parameter.grad is not None]
                pruner.observe(self._copies.pop(self._store.named(stepping)))
        if self._inputs is not None:
            if first:
                add_up = partial(trainer.strategy.reduce, reduce_op="sum")
                self._inputs.end_step(partial(will_step, trainer), add_up)
            else:
                self._inputs.drop()  # a closure has run the batch once more
        if (pruner := self._observer(Needs.NOTHING)) is not None:
            pruner.penalize_(parameters, scale)
        self._store.apply_to_grads_(parameters)

    def end_batch(self, module: LightningModule) -> None:
        """Stop observing; under manual optimization enforce masks: an optimizer without hooks may step."""
        self._observing.close()
        if not module.automatic_optimization:
            self._store.apply_()

    def abandon_batch(self) -> None:
        """Drop the observations of a batch that did not end: half a step is no observation."""
        unfinished = RuntimeError()
        self._observing.__exit__(type(unfinished), unfinished, None)

    def release(self) -> None:
        """Remove all hooks."""
        self._optimizer_hooks.release()
        self._copies.release()
        self.abandon_batch()

    def _observer(self, need: Needs) -> Pruner | None:
        """Return the pruner if an event is left and it needs observations of this kind, otherwise ``None``."""
        pruner = None if self._queue.finished else self._pruner
        return pruner if pruner is not None and need in pruner.needs else None


def _sharing_groups(groups: Iterable[UnitGroup]) -> list[set[str]]:
    """Return disjoint sets of parameter names; all parameters of a unit group are in the same set."""
    sets: dict[str, set[str]] = {}
    for group in groups:
        names = {part.name for part in group.slices}
        joined = names.union(*(sets[name] for name in names & sets.keys()))
        sets |= dict.fromkeys(joined, joined)
    return list({id(each): each for each in sets.values()}.values())
