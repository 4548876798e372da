"""PruningCallback: its arguments, masks, sparsity and report of the pruned network, and its state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import Tensor, nn

from lightning_prune.callbacks.fit import PruningFit
from lightning_prune.callbacks.fit_hooks import FitHooks
from lightning_prune.callbacks.state import PruningState, read_state
from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import Magnitude
from lightning_prune.report.cost import Workload
from lightning_prune.report.report import Report
from lightning_prune.schedules.base import Schedule
from lightning_prune.schedules.curves import Cubic
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.by_score import Global
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.structures.base import Structure
from lightning_prune.structures.weights import Unstructured
from lightning_prune.training.guard import Guard
from lightning_prune.training.lightning_packages import LightningModule, Trainer, TrainerFn, rank_zero_warn
from lightning_prune.training.parts import PruningParts
from lightning_prune.training.pruned_network import PrunedNetwork
from lightning_prune.training.rewind import Rewind
from lightning_prune.training.saved_network import is_compacted
from lightning_prune.units.given_masks import GivenMasks


class PruningCallback(FitHooks):
    """Prunes a LightningModule while it trains.

    Statistics come from ordinary training steps. Weights are removed at the start of an epoch, or before a
    batch, and the fit loop trains the rest further. After each optimizer step removed ("masked") weights are
    exactly 0. Parameters keep their names; masks and all other state are in the checkpoint. Only what the fit
    trains is pruned, unless the structure's ``include`` names it.

    Args:
        target: Share that is removed at the end, in (0, 1); omit it if the selector decides. Or pattern of
            names, as for ``include``, to the share of its units: the first that matches counts, the rest stays.
        criterion: Scores how much a unit matters.
        structure: Which weights are removed together.
        selector: Which units are removed.
        schedule: How much is removed, and when.
        rewind: The earlier point in training to restore after each event; ``None`` restores nothing.
        guard: How much of a metric pruning may cost; ``None`` sets no limit.
        reconstruct: How the weights that are left make up for those that went; ``None`` leaves them alone.
        compact: Whether to cut masked units out of the module when the fit has ended, after a proof on a batch
            of training that outputs stay the same. Checkpoints saved from then on hold the smaller network.
            ``"each"`` cuts them at each pruning event, so that training gets faster; with one device or DDP.
        name: Tells two callbacks in one Trainer apart, which both need another one: their states, reports and
            what they log: ``prune/sparsity``, or ``prune/NAME/sparsity`` with a name.
        measure_seconds: Time limit in seconds for the report's measurements of latency at the end of the fit,
            all together: at least 0, which measures none. One forward pass on a batch of the fit may exceed it.
        write_report: Whether to print the report at the end of the fit and write it to files: in this folder,
            or in the logger's or, without one, the Trainer's ``default_root_dir``, if it was given one.
        keep_zeros: Whether units that are 0 when the fit begins are removed from the start, as those that an
            earlier callback has removed, besides ``masks``. A layer of nothing but zeros is left as it is.
            Without ``target`` no more is removed.
        masks: What is removed from the start: parameter name to a tensor of bool or of 0 and 1, 1 = keep; a
            file of that; or what ``torch.nn.utils.prune`` has pruned. Without ``target`` no more is removed.
        horizon: How long training is as a whole, as "10ep" or "2000st", if the fit is a part of it and others
            follow: moments are placed in all of it. A later fit of the same module goes on where the last one
            has ended, and the network is compacted after the last event. ``None``: the fit is all of it.

    Raises:
        ValueError: If an argument is wrong; before the first training step, if the model has nothing to
            prune, or a moment does not fit into the training.
        CompactionError: At the end of the fit, or at an event with ``compact="each"``, if outputs would change;
            the module has the shapes from before then.
    """

    def __init__(  # noqa: PLR0913 - one argument a question
        self,
        target: float | Mapping[str, float] | None = None,
        *,
        criterion: Criterion = Magnitude(),
        structure: Structure = Unstructured(),
        selector: Selector = Global(),
        schedule: Schedule = Cubic(),
        rewind: Rewind | None = None,
        guard: Guard | None = None,
        reconstruct: Reconstruct | None = None,
        compact: bool | Literal["each"] = False,
        name: str | None = None,
        measure_seconds: float = 2.0,
        write_report: bool | str | Path = True,
        keep_zeros: bool = False,
        masks: Mapping[str, Tensor] | nn.Module | str | Path | None = None,
        horizon: str | None = None,
    ) -> None:
        self.target = target
        self.criterion = criterion
        self.structure = structure
        self.selector = selector
        self.schedule = schedule
        self.rewind = rewind
        self.guard = guard
        self.reconstruct = reconstruct
        self.compact = compact
        self.name = name
        self.measure_seconds = measure_seconds
        self.write_report = write_report
        self.keep_zeros = keep_zeros
        self.given_masks = GivenMasks.of(masks)
        self.horizon = horizon
        self._state = PruningState(self._parts)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the present run, whose Trainer holds what cannot be copied."""
        return vars(self) | {"_fit": None}

    @property
    def _parts(self) -> PruningParts:
        return PruningParts(**{each.name: getattr(self, each.name) for each in fields(PruningParts)})

    # --- public properties and methods

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; it depends on ``name`` alone, so that other settings find it."""
        if self.name is None and self._fit is None:
            _warn_of_unnamed(self)
        return self._parts.state_key

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Name in ``pl_module.named_parameters()`` to bool mask, True where kept; empty before a fit.

        Each mask has the shape of its parameter, and is a ``DTensor`` if the parameter is one.
        """
        store = self._shown.network.store
        return MappingProxyType({}) if store is None else store.masks

    @property
    def settled(self) -> bool:
        """Whether no pruning event is left in this fit and, with a guard, the present round is good."""
        return self._state.settled

    @property
    def sparsity(self) -> float:
        """Removed share, in [0, 1], of the elements that the structure covers, after the last event."""
        return self._shown.history.sparsity

    @property
    def events_left(self) -> bool:
        """Whether a pruning event is left in this fit."""
        return self._state.events_left

    @property
    def undone(self) -> bool:
        """Whether the guard restored an earlier network when the fit ended."""
        return self._state.events.undone

    @property
    def needs_example(self) -> bool:
        """Whether pruning needs an example of the input of ``forward``; :meth:`plan` then needs one, too."""
        return self._parts.needs_example

    @property
    def report(self) -> Report:
        """The report of the network as it stands; its latency was measured at the end of the last fit.

        Raises:
            RuntimeError: Before the first fit.
        """
        shown = self._shown
        model = shown.network.model
        if model is None or shown.network.store is None:
            raise RuntimeError("there is nothing to report before trainer.fit(); plan() looks ahead.")
        return shown.report(self._state.example.workload(model))

    def report_of(self, model: nn.Module, state: Mapping[str, Any], example: Any = None) -> Report:
        """Return the report of a network from a checkpoint; this callback need not be pruning it.

        Args:
            model: The model with the weights of the checkpoint, as ``load_compact`` returns it.
            state: The entry of this ``state_key`` in the checkpoint's ``callbacks``.
            example: As for :meth:`plan`, to count multiply-adds and measure latency on.

        Raises:
            ValueError: If ``state`` is not a callback's state, is not of this model, or was written by a later
                version of lightning_prune.
        """
        work = Workload(example, seconds=self.measure_seconds)
        return PruningState.of_saved(model, state, self._parts).report(work)

    def plan(self, model: nn.Module, example: Any = None) -> Report:
        """Return the report of a dry run: what would be removed at the end, what stays and why.

        The model does not change. If the criterion or the selector needs training steps, the number of units
        that a layer keeps is not known yet, and ``None`` in the report.

        Args:
            model: The model that would be pruned.
            example: As for :class:`Pruner`, to count multiply-adds on, and for structures that need one; by
                default the module's own ``example_input_array``.

        Raises:
            ValueError: As in the fit, if there is nothing to prune.
        """
        return self._parts.plan(model, example)

    def bind(self, model: nn.Module, example: Any = None) -> None:
        """Prune this model from now on, with the state that was loaded or, for the same model, the present one.

        Args:
            model: The model to prune.
            example: As for :meth:`plan`, or a probe, if structure or selector needs one.

        Raises:
            ValueError: If there is nothing to prune in it, or the state is not of it; nothing has changed then.
        """
        self._state.bind(model, example)

    def reset(self) -> None:
        """Drop network, masks and history: the next fit prunes from the start, the same model too."""
        self._state, self._fit = PruningState(self._parts), None

    @property
    def _shown(self) -> PruningState:
        """The state that the properties describe: a loaded one until a fit takes it over."""
        state = self._state
        if state.pending is None or state.given or self._fit is None:
            return state
        return PruningState.of_saved(self._fit.module, state.pending, self._parts)

    # --- a run begins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run: take the arguments as they are now, and hook into the loading of checkpoints."""
        parts = self._parts
        if not self._state.given:
            self._state.pending = None
        if stage == TrainerFn.FITTING:
            self._state = self._state.begin(pl_module, parts)
        neighbours = partial(_networks, [each for each in pruning_callbacks(trainer) if each is not self])
        self._fit = PruningFit(parts, self._state, trainer, pl_module, neighbours)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics, position and history: tensors and plain values only."""
        uncounted = 0 if self._fit is None else self._fit.uncounted_steps
        return self._state.state_dict(uncounted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until the next fit begins; take it over at once if the fit has begun.

        Raises:
            ValueError: If it is not a callback's state, or a later version of lightning_prune wrote it.
        """
        saved = read_state(state_dict)
        self._state.pending = state_dict
        self._state.given = self._fit is None or self._fit.released
        network = self._state.network
        loaded = network.plan is not None and is_compacted(saved["pruner"])
        if (self._fit is not None and self._fit.running) or loaded:
            self.bind(cast(nn.Module, network.model), self._state.example.probe)


def _warn_of_unnamed(callback: PruningCallback) -> None:
    """Warn if whoever asks for the state key holds a list with a second callback without a name.

    A Trainer does when it is made, and raises an error for the two that does not know about names.
    """
    frame = inspect.currentframe()
    for _ in ("this function", "state_key"):
        frame = frame and frame.f_back
    for held in frame.f_locals.values() if frame else ():
        unnamed = _unnamed(held) if isinstance(held, list) else []
        if len(unnamed) > 1 and callback in unnamed:
            rank_zero_warn("Two PruningCallbacks have no name: in one Trainer give each its own, name='...'.")
            return


def _unnamed(callbacks: list[Any]) -> list[PruningCallback]:
    return [each for each in callbacks if isinstance(each, PruningCallback) and each.name is None]


def _networks(callbacks: Sequence[PruningCallback]) -> list[PrunedNetwork]:
    return [each._state.network for each in callbacks]


def pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    """Return the pruning callbacks of a Trainer, in their order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, PruningCallback)]
