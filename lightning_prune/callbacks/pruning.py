"""PruningCallback: Lightning's hooks turned into Pruner calls. No arithmetic on weights happens here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.state import STATE_VERSION, changed_settings, read_state
from lightning_prune.callbacks.view import View
from lightning_prune.core.averages import average_of, averaged_names
from lightning_prune.core.parts import check_flag, check_part, describe
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.export.compacted import LoadHook, callback_state_in
from lightning_prune.pruner import Pruner, check_parts
from lightning_prune.report.history import History
from lightning_prune.report.measurement import measure
from lightning_prune.report.report import Report
from lightning_prune.schedules import Cubic, Schedule
from lightning_prune.selectors import Global, Selector
from lightning_prune.structures import Structure, Unstructured
from lightning_prune.training.example_input import ExampleInput
from lightning_prune.training.fit_events import FitEvents
from lightning_prune.training.guard import Guard
from lightning_prune.training.pruned_network import PrunedNetwork
from lightning_prune.training.rewind import Rewind
from lightning_prune.training.step_hooks import StepHooks
from lightning_prune.training.trainer_queries import (
    averaged_by_callbacks,
    averages_in_callbacks,
    check_launcher,
    check_strategy,
    monitored_metric,
    training_batch,
    training_objects,
    write_report,
)

_NAME = re.compile(r"[^/\\\x00-\x1f]{1,100}")
_WHAT_GOES = {"target", "structure", "selector"}  # settings that decide what is gone in the end


class PruningCallback(Callback):
    """Prunes a LightningModule while it trains.

    Statistics come from ordinary training steps; masks grow at the start of an epoch, or before a batch;
    the loop itself retrains. After each optimizer step masked weights are exactly 0. Parameters keep their
    names, masks and all other state travel in the checkpoint.

    Args:
        target: Share to be gone at the end, in (0, 1); left out where the selector decides.
        criterion: How much a unit matters.
        structure: What lives or dies together.
        selector: Which units go.
        schedule: How much, and when.
        rewind: Where the surviving weights go after an event; nowhere by default.
        guard: What an event may cost; anything by default.
        compact: Whether to shrink the module when the fit has ended, in place, once it is shown on a training
            batch that its outputs stay the same. Checkpoints saved from then on hold the smaller network.
        name: Tells two callbacks in one Trainer, and their reports, apart.

    Raises:
        ValueError: If an argument is wrong; before the first training step, if the model has nothing to
            prune, or a moment does not fit into the training.
        CompactionError: At the end of the fit, if outputs would change; the module is as it was.
    """

    def __init__(  # noqa: PLR0913 - one argument a question
        self,
        target: float | None = None,
        *,
        criterion: Criterion = Magnitude(),
        structure: Structure = Unstructured(),
        selector: Selector = Global(),
        schedule: Schedule = Cubic(),
        rewind: Rewind | None = None,
        guard: Guard | None = None,
        compact: bool = False,
        name: str | None = None,
    ) -> None:
        check_parts(target, criterion, structure, selector)
        check_part(schedule, Schedule, "schedule")
        check_part(rewind, Rewind, "rewind", optional=True)
        check_part(guard, Guard, "guard", optional=True)
        check_flag(compact=compact)
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(f"name={name!r} must be 1 to 100 characters without slashes: files have it.")
        self.target = target
        self.criterion = criterion
        self.structure = structure
        self.selector = selector
        self.schedule = schedule
        self.rewind = rewind
        self.guard = guard
        self.compact = compact
        self.name = name
        self._network = PrunedNetwork()
        self._example_input = ExampleInput()
        self._module: LightningModule | None = None
        self._load_hook: LoadHook | None = None
        self._step_hooks: StepHooks | None = None
        self._events = self._new_rounds()
        self._global_step = 0
        self._history = History()
        self._loaded: dict[str, Any] | None = None
        self._folder = Path()
        self._logged: float | None = None

    @property
    def state_key(self) -> str:
        """Independent of the settings, so that a resume with others finds its state."""
        return "PruningCallback" if self.name is None else f"PruningCallback[{self.name}]"

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Name in ``pl_module.named_parameters()`` to bool mask, True where kept; empty before a fit.

        Divided among processes as the parameter is, if it is: a ``DTensor`` then.
        """
        store = self._shown.subject.store
        return MappingProxyType({}) if store is None else store.masks

    @property
    def settled(self) -> bool:
        """Whether no pruning event is left in this fit and, with a guard, the present round is good."""
        return not self.events_left and (self._network.plan is not None or self._events.good(self._history))

    @property
    def sparsity(self) -> float:
        """Removed share of the elements that the structure covers, after the last event."""
        return self._shown.history.sparsity

    @property
    def events_left(self) -> bool:
        """Whether a pruning event is left in this fit."""
        return self._network.plan is None and not self._events.queue.over

    @property
    def undone(self) -> bool:
        """Whether the guard has gone back to an earlier network when the fit ended."""
        return self._events.undone

    @property
    def report(self) -> Report:
        """The network as it stands.

        Raises:
            RuntimeError: Before the first fit.
        """
        shown = self._shown
        model = shown.subject.model
        if model is None or shown.subject.store is None:
            raise RuntimeError("there is nothing to report before trainer.fit(); plan() looks ahead.")
        return shown.report(self._example_input.example(model))

    def report_of(self, model: nn.Module, state: Mapping[str, Any], example: Any = None) -> Report:
        """The report of a network out of a checkpoint; what this callback is in charge of does not matter.

        Args:
            model: With the weights of the checkpoint, as ``load_compact`` leaves it.
            state: What the callback of this ``state_key`` has saved in it.
            example: Of ``forward``'s input, to count multiply-adds on.

        Raises:
            ValueError: If it is no state, or not of this model, or a later version of lightning_prune wrote it.
        """
        return View.of_saved(model, state, self._new_rounds()).report(example)

    @property
    def _shown(self) -> View:
        """The network as it is: until a fit takes over what was loaded, that is what it holds."""
        if self._loaded is None or self._module is None:
            return View(self._network, self._history, self._events)
        return View.of_saved(self._module, self._loaded, self._new_rounds())

    def plan(self, model: nn.Module, example: Any = None) -> Report:
        """A dry run: what would go at the end, what stays and why. The model stays as it is.

        Where the criterion needs training steps and the selector ranks layers against each other, what
        each layer keeps is not known yet, and ``None`` in the report.

        Args:
            model: What would be pruned.
            example: A tensor, or a tuple of ``forward``'s arguments, to count multiply-adds on, and for
                structures that need one; by default the module's own ``example_input_array``.

        Raises:
            ValueError: As the fit would, if there is nothing to prune.
        """
        if example is None:
            example = getattr(model, "example_input_array", None)
        pruner = self._new_pruner(model, example)
        if self.criterion.needs | self.selector.needs:
            report = measure(model, pruner.masks, example)
            layers = tuple(replace(layer, kept=None) for layer in report.layers)
            return replace(report, layers=layers, macs_kept=None, frozen=pruner.frozen)
        pruner.select(1.0)
        report = measure(model, pruner.masks, example)
        return replace(report, frozen=pruner.frozen, protected=tuple(sorted(pruner.protected)))

    def _new_rounds(self) -> FitEvents:
        return FitEvents(self.target, self.criterion, self.selector, self.schedule, self.rewind, self.guard)

    def _new_pruner(self, model: nn.Module, example: Any = None) -> Pruner:
        return Pruner(
            model,
            self.target,
            criterion=self.criterion,
            structure=self.structure,
            selector=self.selector,
            schedule=None,
            example=example,
        )

    # --- a fit begins and ends

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over a loaded state, and the model with it unless that must wait for a batch."""
        if trainer.global_step == 0 or not self._network.bound_to(pl_module):
            # there are steps in a run resumed from a checkpoint that knew nothing of pruning
            self._events.restart(trainer.global_step // max(1, len(trainer.optimizers)))
        check_strategy(trainer.strategy, self._needs_whole)
        if self._loaded is not None and self._loaded["agenda"]["steps"] > trainer.global_step:
            # before this fit a tuner saved, and brought back, what an earlier one left: no place in this one
            self._loaded = self._loaded | self._events.state_dict()
        check_launcher(trainer, self.compact)
        self._events.begin_fit(trainer)
        self._global_step = trainer.global_step
        self._logged = None
        self._example_input = ExampleInput()
        if not self.needs_example:
            self._begin(trainer, pl_module)

    def _learn(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *, aside: bool = False) -> None:
        """Takes from a first batch what only one can tell; aside if no step is to come."""
        if self.compact or self.needs_example:
            self._example_input.find_probe(trainer, pl_module, batch)
        if self._step_hooks is None:
            self._begin(trainer, pl_module)
        if not self._network.sharded:  # it would take all processes to run it for a report
            self._example_input.capture_forward(trainer, pl_module, batch, aside=aside)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Binds to the model and its optimizers."""
        if self._loaded is not None:
            self._events.check_state(read_state(self._loaded), training_objects(trainer, pl_module))
        self.bind(pl_module, self._example_input.probe)
        self._check_neighbours(trainer)
        self._events.check(pl_module)
        subject, queue = self._network, self._events.queue
        assert subject.store is not None
        self._step_hooks = StepHooks(subject.pruner, subject.store, queue, trainer.optimizers)
        self._history.begin_fit(monitored_metric(trainer) if self.guard is None else self.guard.monitor)
        self._mask_averages(trainer)

    @property
    def _steps(self) -> int:
        return self._events.queue.steps

    @property
    def needs_example(self) -> bool:
        """Whether pruning asks for an example of ``forward``'s input: :meth:`plan` then needs one, too."""
        return self.structure.needs_example or self.selector.needs_example

    @property
    def _needs_whole(self) -> list[str]:
        """What asks for parameters that are whole in each process."""
        wanted = {
            "compact=True": self.compact,
            f"{self.structure!r} with {self.selector!r}": self.needs_example,
            repr(self.rewind): self.rewind is not None,
            repr(self.guard): self.guard is not None,
        }
        return [part for part, asked in wanted.items() if asked]

    def bind(self, model: nn.Module, example: Any = None) -> None:
        """Takes charge of a model, with the state that was loaded or, for the same model, the present one.

        Args:
            model: What is to be pruned.
            example: For structures that need one.

        Raises:
            ValueError: If there is nothing to prune in it, or the state is not of it; nothing has changed then.
        """
        saved = None if self._loaded is None else read_state(self._loaded)
        known = self._network.bound_to(model)
        if saved is not None and saved["pruner"]["plan"] is not None:
            self._network.bind_saved(model, saved["pruner"])
            notes: list[str] = []
        else:
            found = None if saved is None else saved["pruner"]
            notes = self._network.bind(model, lambda: self._new_pruner(model, example), found)
        if not known:
            self._history = History()
        if saved is not None:
            self._take_over(saved, notes)
            self._loaded = None
        self._network.count()

    def _check_neighbours(self, trainer: Trainer) -> None:
        assert self._network.model is not None
        averages = averages_in_callbacks(trainer, self._network.model)
        if averages and (self.rewind is not None or self.guard is not None):
            raise ValueError(
                "rewind and guard bring back weights, which an averaging callback would go on to average with"
                " those that were given up: take one or the other."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PruningCallback) and other is not self:
                shared = sorted(self._network.chosen & other._network.chosen)
                if shared and other._network.model is self._network.model:
                    raise ValueError(
                        f"two PruningCallbacks prune {shared[0]!r}: give them include and exclude patterns"
                        " that keep them apart."
                    )
                if self.rewind is not None or self.guard is not None:
                    raise ValueError(
                        "rewind and guard bring back weights: they are for a single PruningCallback."
                    )
                if self.compact:
                    raise ValueError(
                        "compact=True is for a single PruningCallback: with several, call"
                        " compact(model, masks, example) after the fit, with the masks of each in turn."
                    )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports, unless the network is to be compacted first."""
        if self._step_hooks is None or not (self._example_input.forward_captured or self._network.sharded):
            self._catch_up(trainer, pl_module)
        if self._step_hooks is None:
            return
        self._end_epoch(trainer, trainer.current_epoch - 1)
        pruner = self._network.pruner
        if pruner is not None and self._events.finish(trainer, pl_module, pruner, self._history):
            self._note(trainer)
        if pruner is not None and not self._events.queue.over:
            stopped = any(each.wait_count >= each.patience for each in trainer.early_stopping_callbacks)
            hint = " EarlyStopping ended it: PrunedEarlyStopping waits." if stopped else ""
            rank_zero_warn("The fit ended before the last pruning event: the target is not reached." + hint)
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self.compact:
            write_report(trainer, self.report, self._folder, self.name)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compacts: others have had their ``on_train_end``, and the strategy has let go of the model."""
        resumed = self._loaded is not None or self._network.plan is not None
        if self._step_hooks is None and resumed and trainer.train_dataloader is not None:
            # Lightning had nothing to do, and has called no hook of training
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        if self._step_hooks is None:
            rank_zero_warn("The fit ended before its first batch: nothing is pruned, compacted or reported.")
            return
        if not self.compact:
            return
        subject = self._network
        probe = self._example_input.probe
        if subject.pruner is not None and probe is not None and subject.sparsity > 0:
            probe = probe.to(pl_module.device)
            averages = averages_in_callbacks(trainer, pl_module)
            example = self._example_input.example(pl_module)
            subject.compact_(probe, example, trainer.optimizers, averages, self.report)
        write_report(trainer, self.report, self._folder, self.name)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns from a batch what a fit that was resumed after its last step has not."""
        batch = training_batch(trainer, pl_module)
        if batch is not None:
            self._learn(trainer, pl_module, batch, aside=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing on the model, after an error or Ctrl-C, be it in the middle of an event."""
        if self._step_hooks is not None and self._network.store is not None:
            self._network.store.apply_()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing on the model, however the run ended."""
        self._release()

    def _release(self) -> None:
        self._example_input.release()
        if self._load_hook is not None:
            self._load_hook.release()
        if self._step_hooks is not None:
            self._step_hooks.release()

    # --- events

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prunes at epoch starts: the last metric was measured on the weights that were saved with it."""
        # the module's own on_train_epoch_end, which may log the metric, comes after that of this callback
        self._end_epoch(trainer, trainer.current_epoch - 1)
        self._history.begin_epoch(trainer.callback_metrics)
        if self._step_hooks is not None:
            self._step_hooks.watch(trainer.optimizers)
            self._advance(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prunes before a batch, for moments in steps; the first one is an example, where one is needed."""
        self._learn(trainer, pl_module, batch)
        if (pruner := self._network.pruner) is not None:
            self._events.hold(trainer, pl_module, pruner, batch)
        self._advance(trainer, pl_module, batch_idx)
        cast(StepHooks, self._step_hooks).begin_batch(trainer, batch_idx)

    def _advance(self, trainer: Trainer, pl_module: LightningModule, batch: int = 0) -> None:
        pruner = self._network.pruner
        if pruner is None or not self._events.advance(trainer, pl_module, pruner, self._history, batch):
            return
        self._note(trainer)
        queue = self._events.queue
        if queue.over and not queue.stopped and self._network.sparsity == 0:
            raise RuntimeError(f"{self.selector!r} removed nothing at the last pruning event.")
        self._mask_averages(trainer)

    def _mask_averages(self, trainer: Trainer) -> None:
        """What is averaged from now on is 0 where masked, so that the average stays 0."""
        subject = self._network
        assert subject.model is not None
        assert subject.store is not None
        held = [*averaged_by_callbacks(trainer), *averaged_names(subject.model).items()]
        for name, module in held:
            average = average_of(subject.model, module)
            if average is None:
                rank_zero_warn(
                    f"The average that {name} keeps is not masked: it is of no part of the model, or there"
                    " are several alike that train."
                )
            else:
                subject.store.apply_to_average_(average)

    def _note(self, trainer: Trainer) -> None:
        self._network.count()
        sparsity = self._network.sparsity
        self._history.prune(trainer.current_epoch, self._steps, sparsity)
        removed = {
            f"prune/sparsity/{layer.name}": 1 - cast(int, layer.kept) / layer.size
            for layer in self._network.layers
        }
        for logger in trainer.loggers:
            logger.log_metrics({"prune/sparsity": sparsity} | removed, step=self._steps)

    # --- steps

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradients are there, unscaled and not clipped."""
        cast(StepHooks, self._step_hooks).before_step(trainer, pl_module, optimizer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under manual optimization they are there now, before the user may clip them."""
        cast(StepHooks, self._step_hooks).after_backward(trainer, pl_module)

    def _stepped(self, trainer: Trainer) -> bool:
        """Whether the present batch stepped, with however many optimizers: not while gradients accumulate."""
        return trainer.global_step > self._global_step

    # --- what the user sees on the way

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts, shows the sparsity in the progress bar, and offers it to other callbacks."""
        cast(StepHooks, self._step_hooks).end_batch(pl_module)
        self._events.queue.steps += self._stepped(trainer)
        self._global_step = trainer.global_step
        sparsity = self._history.sparsity
        if batch_idx == 0 or sparsity != self._logged:
            pl_module.log("prune/sparsity", sparsity, prog_bar=True, logger=False, batch_size=1)
            self._logged = sparsity

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the monitored metric, to tell whether this validation measures it."""
        self._history.begin_validation(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the monitored metric beside the sparsity that it was measured at."""
        if trainer.sanity_checking:
            self._events.check_logged(trainer)
        elif trainer.state.fn == TrainerFn.FITTING:
            self._history.end_validation(trainer.callback_metrics, trainer.current_epoch, self._steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does the same for a metric of training steps, and ends a look at a batch that the module skipped."""
        if self._step_hooks is not None:
            self._step_hooks.abandon_batch()
        self._end_epoch(trainer, trainer.current_epoch)

    def _end_epoch(self, trainer: Trainer, epoch: int) -> None:
        self._history.end_epoch(trainer.callback_metrics, epoch, self._steps)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Masks, statistics, position and history: tensors and plain values only."""
        if self._loaded is not None:  # and not taken over yet
            return self._loaded
        if self._network.store is None:
            return {}
        state = {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "pruner": self._network.state_dict(),
            **self._events.state_dict(),
            **self._history.state_dict(),
        }
        trainer = None if self._module is None else self._module._trainer
        if self._step_hooks is not None and trainer is not None:
            # another callback may save it after a step, before this one has counted the step
            state["agenda"]["steps"] += self._stepped(trainer)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved state until the fit begins; in the middle of one, as a tuner does it, takes it over.

        Raises:
            ValueError: If it is none, or a later version of lightning_prune wrote it.
        """
        read_state(state_dict)
        self._loaded = state_dict
        if self._step_hooks is not None or self._network.plan is not None:  # in a fit, or compacted
            self.bind(cast(nn.Module, self._network.model), self._example_input.probe)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what earlier runs left that is of no use here; minds the shapes of what is loaded."""
        self._loaded = None
        self._step_hooks = None
        self._module = pl_module
        if stage == TrainerFn.FITTING and self._network.model is not pl_module:
            self._network.forget()
        self._load_hook = LoadHook(pl_module, lambda checkpoint: self._loading(trainer, pl_module, checkpoint))

    def _loading(
        self, trainer: Trainer, model: nn.Module, checkpoint: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        state = callback_state_in(checkpoint, self.state_key)
        if state is not None:
            read_state(state)  # before anything changes
        return self._network.loading(model, averages_in_callbacks(trainer, model), checkpoint, self.state_key)

    def _take_over(self, state: Mapping[str, Any], notes: list[str]) -> None:
        self._events.load_state_dict(state)
        self._history.load_state_dict(state)
        changed = changed_settings(state["settings"], self._settings())
        notes = [*notes, *changed.values()]
        if changed.keys() & _WHAT_GOES:
            if self._network.plan is None:
                self._events.resume(anew=changed.keys() & _WHAT_GOES != {"target"})
            else:
                rank_zero_warn("The checkpoint's network is compacted, and nothing more of it is pruned.")
        for note in notes:
            rank_zero_info(f"Pruning resumes with a change: {note}.")

    def _settings(self) -> dict[str, str]:
        parts = ("criterion", "structure", "selector", "schedule", "rewind", "guard")
        settings = {name: describe(getattr(self, name)) for name in parts}
        return {"target": repr(self.selector.resolve(self.target)), **settings}
