"""The network that a callback prunes, with its masks: dense, cut, compacted, or loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.plan import Plan, check_applied
from lightning_prune.channels.compaction.replay import cut_tensor, expand_, expand_tensor, replay_
from lightning_prune.channels.compaction.shrink import compact_, prove_plan
from lightning_prune.channels.latency.target import LATENCY_TARGET, LatencyTarget
from lightning_prune.core.averages import Average
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe
from lightning_prune.pruner import Pruner
from lightning_prune.report.cost import Workload
from lightning_prune.report.entries import Layer
from lightning_prune.report.measurement import count_kept, measure_compacted, measure_layers
from lightning_prune.report.report import Report
from lightning_prune.training.lightning_packages import LightningModule, is_lightning_module
from lightning_prune.training.measuring import measured
from lightning_prune.training.saved_network import state_of_dense
from lightning_prune.training.slow_work import slow_work
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.shards import shards_of


class PrunedNetwork:
    """A network and its masks, while a ``Pruner`` prunes it and after it was compacted.

    A network may be cut between its events. Its pruner then knows the dense network, and the masks of that.

    Attributes:
        model: The network; ``None`` before one is bound.
        pruner: Its pruner; ``None`` if nothing more is pruned, as after compaction.
        store: Its masks, in the shapes that it has; after compaction those that still mask a weight.
        plan: The plan by which the dense network was cut or compacted; ``None`` if it is dense.
        record: The report that was made at compaction; ``None`` if it was not compacted.
        layers: Kept and total size of each layer, as of the last :meth:`count`.
        latency: Batch size to seconds of a forward pass, as last measured.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop the network and its masks."""
        self.model: nn.Module | None = None
        self.pruner: Pruner | None = None
        self.store: MaskStore | None = None
        self.plan: Plan | None = None
        self.record: Report | None = None
        self.layers: tuple[Layer, ...] = ()
        self.latency: Mapping[int, float] = {}
        self._saved: Mapping[str, Any] = {}

    def bound_to(self, model: nn.Module) -> bool:
        """Return whether this model is the one that is pruned, and has masks."""
        return self.model is model and self.store is not None

    @property
    def masked(self) -> bool:
        """Whether all masked weights of the network are 0, as they are unless others have changed them."""
        assert self.store is not None
        return self.store.enforced

    def mask(self) -> None:
        """Set all masked weights to 0."""
        assert self.store is not None
        self.store.apply_()

    @property
    def sharded(self) -> bool:
        """Whether the parameters are divided among processes."""
        return self.store is not None and self.store.shards.sharded

    @property
    def covered(self) -> set[str]:
        """Names of the parameters that the unit groups cover; empty once nothing more is pruned."""
        groups = () if self.pruner is None else self.pruner.groups
        return {part.name for group in groups for part in group.slices}

    def bind(
        self, model: nn.Module, make: Callable[[], Pruner], state: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Prune this model from now on. If it is bound already, its masks and statistics stay.

        Args:
            model: The model to prune.
            make: Returns a pruner of it.
            state: A pruner's saved state to continue from; ``None`` to start without one.

        Returns:
            What could not be loaded from the state, in words.

        Raises:
            ValueError: If there is nothing to prune, or the state is not of this model; nothing has changed
                then.
        """
        known = self.bound_to(model)
        if known and (state is None or self.pruner is None):
            return []
        plan = None if state is None else state["plan"]
        if state is not None and self.model is model and self.plan != plan:
            raise ValueError(
                "the state is of a network that was cut otherwise: load the weights of its checkpoint with it."
            )
        with _dense_shapes(model, plan):
            pruner = self.pruner if known else make()
            assert pruner is not None
            notes = [] if state is None else _load(pruner, state)
        if not known:
            self.reset()
            self.model, self.pruner, self.store = model, pruner, pruner.store
        if plan is not None:
            self._take_cut(plan)
        return notes

    def bind_saved(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Bind a model with the masks of a saved state, masked or compacted; nothing more is pruned.

        Args:
            model: The model, with parameters of the shapes that the masks have.
            state: What :meth:`state_dict` returned, as :func:`read_pruned_network` reads it.

        Raises:
            ValueError: If the masks are not of this model; nothing has changed then.
        """
        present = [name for name, _ in model.named_parameters() if name in state["masks"]]
        store = MaskStore(model, present, shards_of(model))
        store.load_state_dict(state["masks"])
        store.apply_()
        self.reset()
        self.model, self.store, self._saved = model, store, state
        self.plan, self.record = state["plan"], state.get("report")
        self.count()

    def count(self) -> None:
        """Update ``layers`` from the masks. All processes must call it, so that a report needs only one."""
        assert self.store is not None
        self.layers = count_kept(self._dense_masks, self.store.shards)

    @property
    def _dense_masks(self) -> Mapping[str, Tensor]:
        """The masks in the shapes of the dense network; of a compacted one those that are left."""
        assert self.store is not None
        if self.plan is None or self.record is not None:
            return self.store.masks
        return {name: expand_tensor(mask, self.plan.cuts_of(name)) for name, mask in self.store.masks.items()}

    @property
    def sparsity(self) -> float:
        """Removed share, in [0, 1], of the elements that the structure covers, as of the last :meth:`count`."""
        removed = sum(layer.size - cast(int, layer.kept) for layer in self.layers)
        return removed / sum(layer.size for layer in self.layers)

    def report(self, work: Workload) -> Report:
        """Return the report of the network as it stands, with the latency that was last measured.

        Args:
            work: What to run the network on.
        """
        if self.record is not None:
            return self.record
        model = cast(nn.Module, self.model)
        if self.sharded:
            work = Workload()  # a forward pass would need all processes
        if self.plan is None:
            report = measured(partial(measure_layers, model, self.layers), [model], work)
        else:
            report = self._measure_cut(model, self.plan, work)
        self.latency = report.latency or self.latency
        remarks = self._saved if self.pruner is None else self.pruner.remarks
        return replace(
            report,
            latency=self.latency,
            latency_target=self._latency_target,
            frozen={name: why for name, why in remarks["frozen"].items() if name not in self._masked_before},
            protected=tuple(remarks["protected"]),
            left_out=remarks["left_out"],
            unreconstructed=remarks["unreconstructed"],
        )

    def _measure_cut(self, model: nn.Module, plan: Plan, work: Workload) -> Report:
        """Return the report of a network that is cut, beside the dense one."""
        assert self.store is not None
        dense = _copy_with_trainer(model)
        expand_(dense, plan)
        unmeasured = replace(work, seconds=0.0)
        report = measured(partial(measure_layers, dense, self.layers), [dense], unmeasured)
        return measured(
            partial(measure_compacted, report, dense, model, self.store.masks), [dense, model], work
        )

    @property
    def _latency_target(self) -> LatencyTarget | None:
        if self.pruner is not None:
            return self.pruner.latency_target
        saved = self._saved["latency_target"]
        return None if saved is None else LATENCY_TARGET(saved)

    @property
    def _masked_before(self) -> set[str]:
        """Names of the parameters that no group covers any more, and that keep their masks."""
        if self.pruner is None:
            return set()
        covered = {part.name for group in self.pruner.groups for part in group.masked}
        return self.pruner.masks.keys() - covered

    def compact_(
        self,
        probe: Probe,
        work: Workload,
        optimizers: Iterable[Optimizer],
        averages: Iterable[Average],
        report: Report,
    ) -> None:
        """Remove the masked units from the tensors of the network, in place.

        Args:
            probe: Runs the network, to prove that its outputs stay the same.
            work: What to run the dense and the compacted network on, to measure them.
            optimizers: The optimizers of its parameters; their state is cut, too.
            averages: Weight averages outside the network; they are cut in the same way.
            report: The report of the masked network.

        Raises:
            CompactionError: If outputs differ; nothing has changed then.
        """
        assert self.pruner is not None
        model = cast(nn.Module, self.model)
        dense = _copy_with_trainer(model)
        pruner = self.pruner
        with slow_work("Compaction, with the proof that outputs stay the same,"):
            groups, parts = pruner.channel_groups, pruner.parts
            done = compact_(model, pruner.masks, groups, probe, optimizers, averages, parts)
        self.plan, masks = done.plan, done.masks
        self.store = _store_of(model, masks)
        self.pruner = None
        report = measured(partial(measure_compacted, report, dense, model, masks), [dense, model], work)
        self.record = replace(report, proof=done.proof, unchanged=done.unchanged)

    def widen_(self, optimizers: Iterable[Optimizer], averages: Iterable[Average]) -> None:
        """Give the network back what was cut of it, if anything was, as zeros: it can be pruned further then.

        Args:
            optimizers: As for :meth:`compact_`.
            averages: As for :meth:`compact_`.
        """
        assert self.pruner is not None
        if self.plan is None:
            return
        expand_(cast(nn.Module, self.model), self.plan, optimizers, averages)
        self.pruner.widen_()
        self.store, self.plan = self.pruner.store, None

    def prove_cut(self, probe: Probe) -> Plan:
        """Return the plan that cuts what the masks of the dense network have removed.

        Raises:
            CompactionError: If outputs would differ.
        """
        assert self.pruner is not None
        pruner = self.pruner
        kept = [(group, group.kept(pruner.masks).cpu()) for group in pruner.groups]
        with slow_work("Cutting the network, with the proof that outputs stay the same,"):
            return prove_plan(cast(nn.Module, self.model), kept, probe, pruner.parts).plan

    def narrow_(self, plan: Plan, optimizers: Iterable[Optimizer], averages: Iterable[Average]) -> None:
        """Cut the network until its next event.

        Args:
            plan: As :meth:`prove_cut` returns it.
            optimizers: As for :meth:`compact_`.
            averages: As for :meth:`compact_`.
        """
        replay_(cast(nn.Module, self.model), plan, optimizers, averages)
        assert self.pruner is not None
        self.pruner.narrow_(plan)
        self._take_cut(plan)

    def _take_cut(self, plan: Plan) -> None:
        assert self.pruner is not None
        masks = {name: cut_tensor(mask, plan.cuts_of(name)) for name, mask in self.pruner.masks.items()}
        self.store, self.plan = _store_of(cast(nn.Module, self.model), masks), plan

    def forget_loaded_(self) -> None:
        """Take the cut of a checkpoint back that was loaded, if no fit has gone on from it."""
        if self.model is not None and self.plan is not None and self.store is None:
            expand_(self.model, self.plan)
            self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics and plan: tensors and plain values only."""
        assert self.store is not None
        if self.pruner is not None and self.plan is not None:
            cut = {"masks": self.store.state_dict(), "plan": self.plan.to_state()}
            return self.pruner.state_dict() | cut
        if self.pruner is not None:
            return self.pruner.state_dict()
        assert self.plan is not None
        assert self.record is not None
        return {
            "masks": self.store.state_dict(),
            "statistics": {},
            "left_out": self.record.left_out,
            "plan": self.plan.to_state(),
            "report": self.record.to_state(),
        }


def _store_of(model: nn.Module, masks: Mapping[str, Tensor]) -> MaskStore:
    store = MaskStore(model, masks)
    for name, mask in masks.items():
        store.masks[name].copy_(mask)
    return store


def _load(pruner: Pruner, state: Mapping[str, Any]) -> list[str]:
    """Load a saved state while the model has its dense shapes, and observe what the state's plan leaves."""
    if pruner.narrow:
        pruner.widen_()
    try:
        return pruner.load_state_dict(state_of_dense(state))
    finally:
        if state["plan"] is not None:
            pruner.narrow_(state["plan"])


def _copy_with_trainer(model: nn.Module) -> nn.Module:
    """Return a copy that has the Trainer of the model, if there is one: ``forward`` may read from it."""
    twin = copy_model(model)
    if is_lightning_module(model) and model._trainer is not None:
        cast(LightningModule, twin).trainer = model.trainer
    return twin


@contextmanager
def _dense_shapes(model: nn.Module, plan: Plan | None) -> Iterator[None]:
    """Take a plan back in a ``with`` block, and apply it again, unless it is ``None``.

    Raises:
        ValueError: If the model is not as after the plan.
    """
    if plan is None:
        yield
        return
    check_applied(model, plan)
    expand_(model, plan)
    try:
        yield
    finally:
        replay_(model, plan)
