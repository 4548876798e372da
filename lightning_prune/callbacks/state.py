"""The state of a PruningCallback, as saved in checkpoints: its network, history and events."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.channels.latency.table import TABLE, LatencyTable
from lightning_prune.core import schema
from lightning_prune.core.parts import describe
from lightning_prune.export.compacted import PRUNING_STATE
from lightning_prune.report.cost import Workload
from lightning_prune.report.history import HISTORY, History
from lightning_prune.report.report import Report
from lightning_prune.schedules.event_queue import EventQueue
from lightning_prune.schedules.moments import TimeUnit
from lightning_prune.training.example_input import ExampleInput
from lightning_prune.training.fit_events import FIT_EVENTS, FIT_EVENTS_BEFORE, FitEvents
from lightning_prune.training.lightning_packages import rank_zero_info, rank_zero_warn
from lightning_prune.training.parts import PruningParts
from lightning_prune.training.pruned_network import PrunedNetwork
from lightning_prune.training.saved_network import is_compacted, read_pruned_network

STATE_VERSION = 1
_STATE = schema.record(
    {
        "version": schema.integer(STATE_VERSION),
        "settings": schema.mapping(schema.string),
        "pruner": read_pruned_network,
        **FIT_EVENTS,
        **HISTORY,
    },
    before=FIT_EVENTS_BEFORE,
)
_FINAL_MASKS = {"target", "target by pattern", "structure", "selector"}  # they decide what is gone at the end


class PruningState:
    """The state of a PruningCallback: what it saves in a checkpoint, and the example input of the fit.

    Args:
        parts: The arguments of the callback.

    Attributes:
        parts: The arguments of the callback.
        network: The network and its masks.
        history: Pruning events and measurements of the monitored metric.
        events: The events of the present fit.
        example: The example input taken from the first batch of the present fit; not saved.
        pending: A loaded state that no fit has taken over yet; ``None`` if there is none.
        given: Whether the pending state was loaded outside of a run, and so is for the next fit.
    """

    def __init__(self, parts: PruningParts) -> None:
        self.parts = parts
        self.network = PrunedNetwork()
        self.history = History()
        self.events = FitEvents(parts)
        self.example = ExampleInput()
        self.pending: dict[str, Any] | None = None
        self.given = False
        self._trained: frozenset[str] = frozenset()

    @classmethod
    def of_saved(cls, model: nn.Module, state: Mapping[str, Any], parts: PruningParts) -> PruningState:
        """Return the state that a checkpoint holds, of a network that is not pruned any further.

        Args:
            model: The model, with the weights of the checkpoint.
            state: The state that a callback has saved.
            parts: The arguments of the callback.

        Raises:
            ValueError: If ``state`` is not a callback's state, is not of this model, or was written by a later
                version of lightning_prune.
        """
        saved = read_state(state)
        found = cls(parts)
        found.network.bind_saved(model, saved["pruner"])
        found.history.load_state_dict(saved)
        found.events.load_state_dict(saved)
        return found

    def begin(self, model: nn.Module, parts: PruningParts) -> PruningState:
        """Return the state with which a fit of a model begins: this one, unless arguments have changed since.

        Args:
            model: The model; what is known of another one is dropped.
            parts: The arguments of the callback as they are now.
        """
        self.network.forget_loaded_()
        known = self.network.model is model
        shown_only = self.given and self.network.pruner is None  # as after oneshot: the fit takes it over
        if known and parts == self.parts and not shown_only:
            return self
        fresh = PruningState(parts)
        fresh.pending, fresh.given = self.pending, self.given
        if known and self.pending is None and self.network.store is not None:  # go on, as from a checkpoint
            self._check_masked()
            fresh.pending, fresh.given = self.state_dict(0), True
        return fresh

    def begin_at(self, step: int, optimizers: int, *, known: bool) -> None:
        """Set the position at which a fit begins, before a state that it resumes is taken over.

        Args:
            step: The Trainer's count of optimizer steps: 0, or that of the checkpoint.
            optimizers: Number of optimizers.
            known: Whether this network was pruned before.
        """
        further = self.parts.horizon is not None and step == 0
        if further and known:
            self.events.queue.go_on()
        elif step == 0 or not known:
            # a run resumed from a checkpoint without pruning state has trained some steps
            self.events.restart(step // max(1, optimizers))
        if self.pending is None:
            return
        saved = read_state(self.pending)
        if further:
            last = EventQueue(0.0)
            last.load_state_dict(saved["agenda"])
            last.go_on()
            self.pending = self.pending | {"agenda": last.state_dict()}
        elif saved["agenda"]["steps"] - saved["agenda"]["earlier"][TimeUnit.STEP.value] > step:
            # a tuner saved and restored the state of an earlier fit: its position does not apply to this one
            self.pending = self.pending | self.events.state_dict()

    @property
    def resumes_cut(self) -> bool:
        """Whether the pending state is of a network that is cut between its events, and so is the module."""
        saved = {} if self.pending is None else self.pending["pruner"]
        return saved.get("plan") is not None and not is_compacted(saved)

    def note_trained(self, names: Set[str]) -> None:
        """Note which parameters the present fit trains; if others did before, units are found anew.

        Args:
            names: Names of the parameters.
        """
        before, self._trained = self._trained, frozenset(names)
        if self.network.pruner is not None and self.pending is None and before != self._trained:
            self._check_masked()
            self.pending = self.state_dict(0)
            self.network.reset()

    def _check_masked(self) -> None:
        """Warn if the network's masked weights are not 0 any more, and set them to 0 again."""
        if not self.network.masked:
            rank_zero_warn(
                "Weights that an earlier fit has removed are not 0 any more: the model was changed since. They"
                " are set to 0 again, and pruning goes on. If the model is to start anew, call the callback's"
                " reset() before the fit."
            )
            self.network.mask()

    @property
    def events_left(self) -> bool:
        """Whether a pruning event is left in this fit; False once the network is compacted."""
        return self.network.record is None and not self.events.queue.finished

    @property
    def settled(self) -> bool:
        """Whether no event is left and, with a guard, the metric of the present round is good enough."""
        if self.events_left:
            return False
        return self.network.record is not None or self.events.guard_state.is_good(self.history.measured)

    def report(self, work: Workload) -> Report:
        """Return the report of the network as it stands.

        Args:
            work: What to run the network on.
        """
        return replace(
            self.network.report(work),
            monitor=self.history.monitor,
            history=tuple(self.history.entries),
            decisions=tuple(self.events.guard_state.decisions),
        )

    def bind(self, model: nn.Module, example: Any) -> None:
        """Prune this model from now on, with the pending state or, for the same model, the present one.

        Args:
            model: The model to prune.
            example: An input of ``forward``, or a probe, if structure or selector needs one.

        Raises:
            ValueError: If there is nothing to prune, or the pending state is not of this model; nothing has
                changed then.
        """
        saved = None if self.pending is None else read_state(self.pending)
        known = self.network.bound_to(model)
        notes: list[str] = []
        if saved is not None and is_compacted(saved["pruner"]):
            self.network.bind_saved(model, saved["pruner"])
        else:
            make = partial(self.parts.new_pruner, model, example, self._measured_before(saved))
            notes = self.network.bind(model, make, None if saved is None else saved["pruner"])
        if not known:
            self.history = History()
        if saved is not None:
            self._take_over(saved, notes)
            self.pending, self.given = None, False
        elif known:
            self._check_masked()
        self.network.count()

    def _measured_before(self, saved: Mapping[str, Any] | None) -> LatencyTable | None:
        """Return the measured times of a saved state; ``None`` if there are none, or for another selector."""
        if saved is None or saved["settings"].get("selector") != describe(self.parts.selector):
            return None
        table = saved["pruner"]["latency_table"]
        return None if table is None else TABLE(table)

    def _take_over(self, saved: Mapping[str, Any], notes: list[str]) -> None:
        self.events.load_state_dict(saved)
        self.history.load_state_dict(saved)
        changed = changed_settings(saved["settings"], self.parts.describe())
        if other := changed.keys() & _FINAL_MASKS:
            if self.network.record is None:
                self.events.resume(anew=other != {"target"})
            else:
                rank_zero_warn("The checkpoint's network is compacted, and nothing more of it is pruned.")
        for note in (*notes, *changed.values()):
            rank_zero_info(f"Pruning resumes with a change: {note}.")

    def state_dict(self, uncounted_steps: int) -> dict[str, Any]:
        """Return tensors and plain values only.

        Args:
            uncounted_steps: Optimizer steps that were taken and are not counted yet.
        """
        if self.pending is not None:
            return self.pending
        if self.network.store is None:
            return {}
        state = {
            "version": STATE_VERSION,
            "settings": self.parts.describe(),
            "pruner": self.network.state_dict(),
            **self.events.state_dict(),
            **self.history.state_dict(),
        }
        state["agenda"]["steps"] += uncounted_steps
        return state


def read_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a callback's state, checked as a whole.

    Raises:
        ValueError: If it is not a callback's state, or a later version of lightning_prune wrote it.
    """
    return schema.read_versioned(state, _STATE, STATE_VERSION, PRUNING_STATE)


def changed_settings(saved: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return a sentence for each argument that differs, by name; one missing in ``saved`` was ``None``."""
    before = {name: saved.get(name, repr(None)) for name in settings}
    return {
        name: f"{name} was {before[name]}, is now {now}"
        for name, now in settings.items()
        if before[name] != now
    }
