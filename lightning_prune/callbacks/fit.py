"""One run of a Trainer with a PruningCallback: the actions at each hook of the callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch.optim import Optimizer

from lightning_prune.callbacks.load_hook import LoadHook
from lightning_prune.callbacks.neighbours import check_neighbours
from lightning_prune.callbacks.state import PruningState, read_state
from lightning_prune.core.averages import average_of, averaged_modules
from lightning_prune.core.progress import allow_progress_bars
from lightning_prune.core.trained import training_only
from lightning_prune.export.compacted import callback_state_in
from lightning_prune.training import report_files, reshaping, trainer_data, trainer_queries
from lightning_prune.training.checkpoint_shapes import loading
from lightning_prune.training.example_input import ExampleInput
from lightning_prune.training.lightning_packages import LightningModule, Trainer, TrainerFn, rank_zero_warn
from lightning_prune.training.parts import PruningParts
from lightning_prune.training.pruned_network import PrunedNetwork
from lightning_prune.training.step_hooks import StepHooks

_UNMASKED = (
    "The average that {} keeps is not masked: it is of no part of the model, or of one of several alike."
)


@dataclass(eq=False)
class PruningFit:
    """One run of a Trainer on one module: a fit, a validation or a test.

    Args:
        parts: The arguments of the callback.
        state: The state of the callback, which outlives the run.
        trainer: The Trainer.
        module: The module that the Trainer runs.
        neighbours: Returns the networks of the Trainer's other pruning callbacks.
    """

    parts: PruningParts
    state: PruningState
    trainer: Trainer
    module: LightningModule
    neighbours: Callable[[], Sequence[PrunedNetwork]]
    released: bool = False  # when the run has ended
    _step_hooks: StepHooks | None = None
    _marks: ExitStack = field(default_factory=ExitStack)  # of the parameters that train
    _global_step: int = 0
    _logged: float | None = None
    _validation_batches: dict[int, Any] = field(default_factory=dict)  # of the sanity check, by loader
    _folder: Path | None = None  # of the report's files
    _warn: trainer_queries.WarnOnce = field(default_factory=trainer_queries.WarnOnce)

    def __post_init__(self) -> None:
        self._load_hook = LoadHook(self.module, self._loading)

    @property
    def running(self) -> bool:
        """Whether the hooks of training steps are in place: from the first batch on at the latest."""
        return self._step_hooks is not None

    @property
    def uncounted_steps(self) -> int:
        """1 if the present batch has stepped and is not counted yet, as when another callback saves; else 0."""
        return int(self.running and self.module._trainer is not None and self._stepped)

    @property
    def _stepped(self) -> bool:
        """Whether the present batch ended in an optimizer step, of one optimizer or several."""
        return self.trainer.global_step > self._global_step

    def _progress_bars(self) -> AbstractContextManager[None]:
        """Return the context manager in which progress bars are shown if the Trainer shows them."""
        return allow_progress_bars(trainer_queries.shows_progress(self.trainer))

    # --- the run begins

    def start(self) -> None:
        """Compute when events are due, and bind to the module unless that needs a batch.

        Raises:
            ValueError: If the arguments do not fit the Trainer, the module or the length of the fit.
        """
        state, trainer = self.state, self.trainer
        state.begin_at(trainer.global_step, len(trainer.optimizers), known=state.network.bound_to(self.module))
        trainer_queries.check_callbacks(trainer)
        trainer_queries.check_strategy(trainer.strategy, self.parts.needs_whole)
        trainer_queries.check_launcher(trainer, self.parts.compact)
        state.events.begin_fit(trainer)
        self._global_step = trainer.global_step
        self._logged = None
        state.example = ExampleInput()
        if not self.parts.needs_example:
            self._bind()

    def _read_batch(self, batch: Any, *, on_copy: bool = False) -> None:
        """Take the example input from a first batch; ``on_copy`` if no training step on the batch follows."""
        state, parts = self.state, self.parts
        if parts.needs_probe:
            state.example.find_probe(self.trainer, self.module, batch, self._validation_batches)
            self._validation_batches.clear()
        if not self.running:
            self._bind()
        if not state.network.sharded:  # a forward pass for a report would need all processes
            state.example.capture_forward(self.trainer, self.module, batch, on_copy=on_copy)

    def _bind(self) -> None:
        """Bind the state to the module, and add the hooks of training steps."""
        state, parts, trainer = self.state, self.parts, self.trainer
        if state.pending is not None:
            state.events.check_state(
                read_state(state.pending), trainer_queries.training_objects(trainer, self.module)
            )
        trained = trainer_queries.trained_parameters(trainer, self.module)
        self._marks.enter_context(training_only(self.module, trained.values()))
        state.note_trained(trained.keys())
        with self._progress_bars(), reshaping.reshaping(trainer) if state.resumes_cut else nullcontext():
            state.bind(self.module, state.example.probe)
        network = state.network
        network.mask()  # given masks may remove what is not 0 yet
        check_neighbours(parts, network, self.neighbours(), trainer, self.module)
        state.events.check(self.module)
        if network.pruner is not None and network.sparsity > state.history.sparsity:  # zeros that were there
            self._log_event()
        if network.pruner is not None and parts.shrinks:
            reshaping.check_reshaping(trainer, self.module, network.pruner)
        if network.pruner is not None and (network.plan is None) == (parts.shrinks and network.sparsity > 0):
            with self._whole():
                pass  # the network is cut, or not, as another callback has left it
        self._hook_steps()
        monitor = trainer_queries.monitored_metric(trainer) if parts.guard is None else parts.guard.monitor
        state.history.begin_fit(monitor)
        _mask_averages(self.state.network, self.trainer, self.module, self._warn)

    def _hook_steps(self) -> None:
        """Add the hooks of training steps, in place of those from before shapes have changed."""
        network, queue = self.state.network, self.state.events.queue
        assert network.store is not None
        if self._step_hooks is not None:
            self._step_hooks.release()
        self._step_hooks = StepHooks(network.pruner, network.store, queue, self.trainer.optimizers)

    def _whole(self) -> AbstractContextManager[None]:
        """Return the context in which the network is pruned, and after which it is cut, if that is wanted."""
        network, probe = self.state.network, self.state.example.probe if self.parts.shrinks else None
        if network.plan is None and probe is None:
            return nullcontext()
        return reshaping.dense_shapes(self.trainer, self.module, network, probe)

    def _loading(self, checkpoint: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context manager in which the module takes the shapes of a checkpoint."""
        state_key = self.parts.state_key
        state = callback_state_in(checkpoint, state_key)
        if state is not None:
            read_state(state)  # before anything changes
        averages = trainer_queries.averages_in_callbacks(self.trainer, self.module)
        return loading(self.state.network, self.module, averages, checkpoint, state_key)

    # --- epochs and batches

    def begin_epoch(self) -> None:
        """Prune if an event is due at the start of this epoch."""
        # the module's own on_train_epoch_end, which may log the metric, runs after that of a callback
        self.end_epoch(self.trainer.current_epoch - 1)
        self.state.events.queue.note_trained(self.trainer.current_epoch)
        self.state.history.begin_epoch(self.trainer.callback_metrics)
        if self._step_hooks is not None:
            self._step_hooks.attach(self.trainer.optimizers)
            self._advance()

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Read the first batch, prune if an event is due before this one, and observe its step."""
        self._read_batch(batch)
        if (pruner := self.state.network.pruner) is not None:
            self.state.events.add_batch(self.trainer, self.module, pruner, batch)
        self._advance(batch_idx)
        cast(StepHooks, self._step_hooks).begin_batch(self.trainer, batch_idx)

    def _advance(self, batch: int = 0) -> None:
        network, events = self.state.network, self.state.events
        if network.pruner is None:
            return
        with self._progress_bars():
            pruned = events.advance(
                self.trainer, self.module, network.pruner, self.state.history, self._whole, batch
            )
        if not pruned:
            return
        if self.parts.shrinks:
            self._hook_steps()
        self._log_event()
        if events.queue.finished and not events.queue.stopped and network.sparsity == 0:
            raise RuntimeError(
                f"{self.parts.selector!r} removed nothing at the last pruning event: raise the target, or the"
                " level of a Threshold."
            )
        _mask_averages(self.state.network, self.trainer, self.module, self._warn)

    def _log_event(self) -> None:
        network, steps = self.state.network, self.state.events.queue.steps
        network.count()
        self.state.history.record_event(self.trainer.current_epoch, steps, network.sparsity)
        metric = self.parts.metric
        removed = {f"{metric}/{layer.name}": 1 - cast(int, layer.kept) / layer.size for layer in network.layers}
        for logger in self.trainer.loggers:
            logger.log_metrics({metric: network.sparsity} | removed, step=steps)

    def before_step(self, optimizer: Optimizer) -> None:
        """Observe gradients before an optimizer's step: unscaled and not clipped."""
        cast(StepHooks, self._step_hooks).before_step(self.trainer, self.module, optimizer)

    def after_backward(self) -> None:
        """Observe gradients under manual optimization, before the user may clip them."""
        cast(StepHooks, self._step_hooks).after_backward(self.trainer, self.module)

    def end_batch(self, batch_idx: int) -> None:
        """Count the step, and log the sparsity to the progress bar and for other callbacks."""
        cast(StepHooks, self._step_hooks).end_batch(self.module)
        if self.parts.shrinks and self._stepped and self.state.events.queue.steps == 0:
            reshaping.check_optimizer_states(self.trainer.optimizers)
        self.state.events.queue.steps += self._stepped
        self._global_step = self.trainer.global_step
        sparsity = self.state.history.sparsity
        if batch_idx == 0 or sparsity != self._logged:
            self.module.log(self.parts.metric, sparsity, prog_bar=True, logger=False, batch_size=1)
            self._logged = sparsity

    def begin_validation(self) -> None:
        """Remember the monitored metric, to tell whether this validation logs it."""
        self.state.history.begin_validation(self.trainer.callback_metrics)

    def begin_validation_batch(self, batch: Any, loader: int) -> None:
        """Keep the first batch of each loader in the sanity check until the module is traced."""
        if self.trainer.sanity_checking and self.parts.needs_probe:
            self._validation_batches.setdefault(loader, batch)

    def end_validation(self) -> None:
        """Record the monitored metric with the sparsity at which it was measured."""
        trainer, state = self.trainer, self.state
        if trainer.sanity_checking:
            state.events.guard_state.check_logged(trainer.callback_metrics)
        elif trainer.state.fn == TrainerFn.FITTING:
            steps = state.events.queue.steps
            state.history.end_validation(trainer.callback_metrics, trainer.current_epoch, steps)

    def end_training_epoch(self) -> None:
        """Record a metric logged in training steps, and drop observations of a batch that was skipped."""
        if self._step_hooks is not None:
            self._step_hooks.abandon_batch()
        self.end_epoch(self.trainer.current_epoch)

    def end_epoch(self, epoch: int) -> None:
        """Record the monitored metric if it was logged in this epoch, unless a validation recorded it."""
        self.state.history.end_epoch(self.trainer.callback_metrics, epoch, self.state.events.queue.steps)

    # --- the run ends

    def end_training(self) -> None:
        """End the last round."""
        state, trainer = self.state, self.trainer
        network, events = state.network, state.events
        if not self.running or not (state.example.forward_captured or network.sharded):
            # a fit that was resumed after its last step has seen no batch
            batch = trainer_data.training_batch(trainer, self.module)
            if batch is not None:
                self._read_batch(batch, on_copy=True)
        if not self.running:
            return
        self.end_epoch(trainer.current_epoch - 1)
        events.queue.note_trained(trainer.current_epoch)
        pruner = network.pruner
        if pruner is not None:
            with self._progress_bars():
                pruned = events.finish(trainer, self.module, pruner, state.history)
            if pruned:
                self._log_event()
            events.tell_of_those_left(trainer, self.module)
        self._folder = report_files.report_folder(trainer, self.parts.write_report)

    def end(self) -> None:
        """Compact the network if that is wanted, and write the report.

        Every ``on_train_end`` has run, so checkpoints are saved, and the strategy has released the model.

        Raises:
            CompactionError: If the outputs would change; the module is unchanged then.
        """
        state, network, trainer = self.state, self.state.network, self.trainer
        resumed = state.pending is not None or network.plan is not None
        if not self.running and resumed and trainer.train_dataloader is not None:
            # the checkpoint was at the end of training, and Lightning has called no training hook
            self.start()
            self.end_training()
        if not self.running:
            rank_zero_warn("The fit ended before its first batch: nothing is pruned, compacted or reported.")
            return
        probe = state.example.probe
        work = state.example.workload(self.module, self.parts.measure_seconds, trainer.strategy.root_device)
        ready = network.pruner is not None and network.sparsity > 0 and not state.events.to_be_continued
        if self.parts.compact and ready and probe is not None:
            averages = trainer_queries.averages_in_callbacks(trainer, self.module)
            network.widen_(trainer.optimizers, averages)
            with self._progress_bars():
                network.compact_(
                    probe.to(self.module.device),
                    work,
                    trainer.optimizers,
                    averages,
                    state.report(replace(work, seconds=0.0)),
                )
        report_files.write_report(trainer, state.report(work), self.parts, self._folder)

    def interrupt(self) -> None:
        """Enforce the masks after an error or Ctrl-C, which may interrupt a pruning event, and remove hooks."""
        if self.running and self.state.network.store is not None:
            self.state.network.store.apply_()
        self.release()

    def release(self) -> None:
        """Remove all hooks from the module and its optimizers."""
        self.released = True
        self.state.example.release()
        self._load_hook.release()
        self._marks.close()
        if self._step_hooks is not None:
            self._step_hooks.release()


def _mask_averages(
    network: PrunedNetwork, trainer: Trainer, module: LightningModule, warn: trainer_queries.WarnOnce
) -> None:
    """Set masked weights to 0 in weight averages, where they then stay 0; warn of averages of no known part."""
    assert network.store is not None
    held = [*trainer_queries.averaged_by_callbacks(trainer), *averaged_modules(module).items()]
    for name, average_module in held:
        average = average_of(module, average_module)
        if average is None:
            warn(trainer, _UNMASKED.format(name))
        else:
            network.store.apply_to_average_(average)
