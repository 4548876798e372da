"""PruningCallback: Lightning's hooks turned into Pruner calls. No arithmetic on weights happens here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.agenda import Agenda
from lightning_prune.collect import (
    ExampleCapture,
    GradientCopies,
    OptimizerWatch,
    gradients,
    parameters_of,
)
from lightning_prune.criteria import Criterion, Magnitude, Needs
from lightning_prune.moments import Unit
from lightning_prune.parts import check_part
from lightning_prune.pruner import Pruner, check_parts
from lightning_prune.report import Entry, Report, measure
from lightning_prune.schedules import Cubic, Schedule, Timetable
from lightning_prune.selectors import Global, Selector
from lightning_prune.structures import Structure, Unstructured
from lightning_prune.trainers import horizon, loss_scale, monitored

_STATE_VERSION = 1


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
        name: Tells two callbacks in one Trainer apart.

    Raises:
        ValueError: If an argument is wrong; before the first training step, if the model has nothing to
            prune, or a moment does not fit into the training.
    """

    def __init__(
        self,
        target: float | None = None,
        *,
        criterion: Criterion = Magnitude(),
        structure: Structure = Unstructured(),
        selector: Selector = Global(),
        schedule: Schedule = Cubic(),
        name: str | None = None,
    ) -> None:
        check_parts(target, criterion, structure, selector)
        check_part(schedule, Schedule, "schedule")
        self.target = target
        self.criterion = criterion
        self.structure = structure
        self.selector = selector
        self.schedule = schedule
        self.name = name
        self._model: LightningModule | None = None
        self._pruner: Pruner | None = None
        self._watch: OptimizerWatch | None = None
        self._capture: ExampleCapture | None = None
        self._copies = GradientCopies()
        self._agenda = Agenda()
        self._global_step = 0
        self._history: list[Entry] = []
        self._monitor: str | None = None
        self._loaded: dict[str, Any] | None = None
        self._shown: float | None = None
        self._warned = False

    @property
    def state_key(self) -> str:
        """Independent of the settings, so that a resume with others finds its state."""
        return "PruningCallback" if self.name is None else f"PruningCallback[{self.name}]"

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Name in ``pl_module.named_parameters()`` to bool mask, True where kept; empty before a fit."""
        return MappingProxyType({}) if self._pruner is None else self._pruner.masks

    @property
    def report(self) -> Report:
        """The network as it stands.

        Raises:
            RuntimeError: Before the first fit.
        """
        if self._pruner is None or self._model is None:
            raise RuntimeError("there is nothing to report before trainer.fit(); plan() looks ahead.")
        example = getattr(self._model, "example_input_array", None)
        if example is None and self._capture is not None:
            example = self._capture.example
        try:
            report = measure(self._model, self.masks, example)
        except Exception as error:  # a user's forward may raise anything, and a report must not end a fit
            rank_zero_warn(f"The report goes without multiply-adds: forward failed with {error!r}.")
            report = measure(self._model, self.masks)
        return replace(
            report,
            frozen=self._pruner.frozen,
            protected=tuple(sorted(self._pruner.protected)),
            left_out=self._pruner.left_out,
            monitor=self._monitor,
            history=tuple(self._history),
        )

    def plan(self, model: nn.Module, example: Any = None) -> Report:
        """A dry run: what would go at the end, what stays and why. The model stays as it is.

        Where the criterion needs training steps and the selector ranks layers against each other, what
        each layer keeps is not known yet, and ``None`` in the report.

        Args:
            model: What would be pruned.
            example: A tensor, or a tuple of ``forward``'s arguments, to count multiply-adds on.

        Raises:
            ValueError: As the fit would, if there is nothing to prune.
        """
        pruner = self._new_pruner(model, example)
        if Needs.GRADIENT in self.criterion.needs:
            report = measure(model, pruner.masks, example)
            layers = tuple(replace(layer, kept=None) for layer in report.layers)
            return replace(report, layers=layers, macs_kept=None, frozen=pruner.frozen)
        pruner.select(1.0)
        report = measure(model, pruner.masks, example)
        return replace(report, frozen=pruner.frozen, protected=tuple(sorted(pruner.protected)))

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
        """Binds to the model and its optimizers, and takes over a loaded state."""
        if trainer.global_step == 0:
            self._agenda.restart()
        elif self._pruner is None and self._loaded is None:
            # resumed from a checkpoint that knew nothing of pruning
            self._agenda.steps = trainer.global_step // max(1, len(trainer.optimizers))
        pruner = self.bind(pl_module)
        self._global_step = trainer.global_step
        self._check_neighbours(trainer)
        self._agenda.timetable = self._resolve(trainer)
        self._monitor = monitored(trainer)
        self._shown = None
        self._warned = False
        self._watch = OptimizerWatch(pruner.store)
        self._watch.watch(trainer.optimizers)
        self._capture = ExampleCapture(pl_module)

    def bind(self, model: LightningModule) -> Pruner:
        """Takes charge of a model, with the state that was loaded or, for the same model, the present one."""
        if self._pruner is None or self._model is not model:
            self._pruner, self._model = self._new_pruner(model), model
            self._history = []
        if self._loaded is not None:
            self._take_over(self._pruner, self._loaded)
            self._loaded = None
        return self._pruner

    def _check_neighbours(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PruningCallback) and other is not self:
                shared = sorted(set(self.masks) & set(other.masks))
                if shared and other._model is self._model:
                    raise ValueError(
                        f"two PruningCallbacks prune {shared[0]!r}: give them include and exclude patterns"
                        " that keep them apart."
                    )

    def _resolve(self, trainer: Trainer) -> Timetable:
        try:
            timetable = self.schedule.timetable(horizon(trainer))
            first = next(event for event in timetable.events if event.fraction > 0)
            if first.position == 0 and Needs.GRADIENT in self.criterion.needs:
                raise ValueError(
                    f"{self.schedule!r} prunes before the first batch, when {self.criterion!r} has seen no"
                    " gradient: start later, or choose a criterion that looks at weights."
                )
        except ValueError as error:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise
            rank_zero_info(f"fast_dev_run is too short to prune: {error}")
            return Timetable(Unit.STEP, ())
        return timetable

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports."""
        if not self._agenda.over:
            rank_zero_warn("The fit ended before the last pruning event: the target is not reached.")
        report = self.report
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            print(report.table())
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._write(report, folder)

    def _write(self, report: Report, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = "report" if self.name is None else f"report-{self.name}"
        (folder / f"{stem}.json").write_text(report.to_json())
        try:
            report.plot(folder / f"{stem}.png")
        except ImportError:
            rank_zero_info("matplotlib is not installed, so there is no plot of the report.")
        rank_zero_info(f"Pruning report written to {folder / stem}.json.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing on the model, after an error or Ctrl-C."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing on the model, however the run ended."""
        self._release()

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.release()
        if self._capture is not None:
            self._capture.release()
        self._copies.release()

    # --- events

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prunes at epoch starts: the last metric was measured on the weights that were saved with it."""
        if self._watch is not None:
            self._watch.watch(trainer.optimizers)
        self._prune_if_due(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prunes before a batch, for moments in steps."""
        self._prune_if_due(trainer)

    def _prune_if_due(self, trainer: Trainer) -> None:
        assert self._pruner is not None
        event = self._agenda.due(trainer.current_epoch)
        if event is None:
            return
        if event.fraction > 0 and not self._pruner.ready:
            if not self._warned:
                rank_zero_warn("A pruning event waits: no step with finite gradients was seen yet.")
                self._warned = True
            return
        self._pruner.prune(event.fraction, *trainer.optimizers)
        self._agenda.handle(trainer.current_epoch)
        sparsity = self._pruner.sparsity
        if self._agenda.over and sparsity == 0:
            raise RuntimeError(f"{self.selector!r} removed nothing at the last pruning event.")
        self._history.append(Entry(trainer.current_epoch, self._agenda.steps, sparsity))
        removed = {
            f"prune/sparsity/{name}": 1 - int(mask.count_nonzero()) / mask.numel()
            for name, mask in self.masks.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics({"prune/sparsity": sparsity} | removed, step=self._agenda.steps)

    # --- steps

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Observes unclipped gradients, and takes those of masked weights out before they are clipped."""
        assert self._pruner is not None
        assert self._watch is not None
        store, parameters = self._pruner.store, parameters_of(optimizer)
        if self._observing and self._watch.first_look(optimizer):
            if pl_module.automatic_optimization:
                unscaled = not getattr(optimizer, "_step_supports_amp_scaling", False)
                scale = 1.0 if unscaled else loss_scale(trainer)
                self._pruner.observe(gradients(store, parameters, scale))
            else:
                self._pruner.observe(self._copies.take(store.named(parameters)))
        store.apply_to_grads_(parameters)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under manual optimization the user may clip before the next hook, so it happens here."""
        if pl_module.automatic_optimization:
            return
        assert self._pruner is not None
        parameters = list(pl_module.parameters())
        if self._observing:
            self._copies.hold(gradients(self._pruner.store, parameters, loss_scale(trainer)))
        self._pruner.store.apply_to_grads_(parameters)

    @property
    def _observing(self) -> bool:
        return Needs.GRADIENT in self.criterion.needs and not self._agenda.over

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
        # one for a batch, however many optimizers stepped; none while gradients accumulate
        self._agenda.steps += trainer.global_step > self._global_step
        self._global_step = trainer.global_step
        sparsity = self._history[-1].sparsity if self._history else 0.0
        if batch_idx == 0 or sparsity != self._shown:
            pl_module.log("prune/sparsity", sparsity, prog_bar=True, logger=False, batch_size=1)
            self._shown = sparsity

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the monitored metric beside the sparsity that it was measured at."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._note_metric(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does the same in a fit without validation."""
        if not trainer.enable_validation:
            self._note_metric(trainer)

    def _note_metric(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self._monitor or "")
        if value is not None:
            sparsity = self._history[-1].sparsity if self._history else 0.0
            self._history.append(Entry(trainer.current_epoch, self._agenda.steps, sparsity, float(value)))

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Masks, statistics, position and history: tensors and plain values only."""
        if self._pruner is None:
            return self._loaded or {}
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            "pruner": self._pruner.state_dict(),
            "agenda": self._agenda.state_dict(),
            "history": [asdict(entry) for entry in self._history],
            "monitor": self._monitor,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved state until the model is there to take it.

        Raises:
            ValueError: If a later version of lightning_prune wrote it.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's pruning state has version {version!r}, this lightning_prune reads"
                f" {_STATE_VERSION}: install the version that wrote it."
            )
        self._loaded = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets a state that an earlier run loaded and did not use, as a test does."""
        self._loaded = None

    def _take_over(self, pruner: Pruner, state: Mapping[str, Any]) -> None:
        notes = pruner.load_state_dict(state["pruner"])
        self._agenda.load_state_dict(state["agenda"])
        self._history = [Entry(**entry) for entry in state["history"]]
        self._monitor = state["monitor"]
        for name, now in self._settings().items():
            before = state["settings"].get(name)
            if before != now:
                notes.append(f"{name} was {before}, is now {now}")
        for note in notes:
            rank_zero_info(f"Pruning resumes with a change: {note}.")

    def _settings(self) -> dict[str, str]:
        parts = ("target", "criterion", "structure", "selector", "schedule")
        return {name: repr(getattr(self, name)) for name in parts}
