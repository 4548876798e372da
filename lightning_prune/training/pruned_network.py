"""The network that a callback prunes, with its masks: pruned, compacted, or loaded from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.plan import PLAN, Plan
from lightning_prune.channels.compaction.replay import expand_, replay_
from lightning_prune.channels.compaction.shrink import compact_
from lightning_prune.channels.latency.target import LATENCY_TARGET, LatencyTarget
from lightning_prune.core import schema
from lightning_prune.core.averages import Average
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe
from lightning_prune.export import compacted
from lightning_prune.pruner import Pruner
from lightning_prune.report.cost import Workload
from lightning_prune.report.entries import Layer
from lightning_prune.report.measurement import count_kept, measure_compacted, measure_layers
from lightning_prune.report.report import REPORT, Report
from lightning_prune.selectors.pruned_state import PRUNED
from lightning_prune.training.lightning_packages import LightningModule, is_lightning_module
from lightning_prune.training.measuring import measured
from lightning_prune.training.slow_work import slow_work
from lightning_prune.units.masks import MASKS, MaskStore
from lightning_prune.units.shards import shards_of

_COMPACTED = schema.record(
    {
        "masks": MASKS,
        "statistics": schema.mapping(schema.anything),
        "left_out": schema.integer(),
        "plan": PLAN,
        "report": REPORT,
    }
)


def read_pruned_network(state: Any) -> dict[str, Any]:
    """Return a saved network, checked: the state of a pruner, or of a compacted network.

    Raises:
        ValueError: If it is neither.
    """
    compacted = schema.mapping(schema.anything)(state).get("plan") is not None
    return (_COMPACTED if compacted else PRUNED)(state)


class PrunedNetwork:
    """A network and its masks, while a ``Pruner`` prunes it and after it was compacted.

    Attributes:
        model: The network; ``None`` before one is bound.
        pruner: Its pruner; ``None`` if nothing more is pruned, as after compaction.
        store: Its masks; after compaction those that still mask a weight of the smaller network.
        plan: The plan by which it was compacted; ``None`` if it was not.
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
        pruner = self.pruner if known else make()
        notes = [] if pruner is None or state is None else pruner.load_state_dict(state)
        if pruner is not None and not known:
            self.reset()
            self.model, self.pruner, self.store = model, pruner, pruner.store
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
        self.layers = count_kept(self.store.masks, self.store.shards)

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
        assert self.model is not None
        assert self.store is not None
        if self.sharded:
            work = Workload()  # a forward pass would need all processes
        report = measured(partial(measure_layers, self.model, self.layers), [self.model], work)
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
        dense = copy_model(model)
        if is_lightning_module(model):
            # a copy has no Trainer, and forward may read from it
            cast(LightningModule, dense).trainer = model.trainer
        pruner = self.pruner
        with slow_work("Compaction, with the proof that outputs stay the same,"):
            done = compact_(model, pruner.masks, pruner.channel_groups, probe, optimizers, pruner.parts)
        self.plan, masks = done.plan, done.masks
        for average in averages:
            replay_(average.module, self.plan.renamed(average.names))
        self.store = MaskStore(model, masks)
        for name, mask in masks.items():
            self.store.masks[name].copy_(mask)
        self.pruner = None
        report = measured(partial(measure_compacted, report, dense, model, masks), [dense, model], work)
        self.record = replace(report, proof=done.proof, unchanged=done.unchanged)

    @contextmanager
    def loading(
        self, model: nn.Module, averages: Sequence[Average], checkpoint: Mapping[str, Any], state_key: str
    ) -> Iterator[None]:
        """Give a model the shapes of a checkpoint, in a ``with`` block before its weights are loaded.

        Within the block the model has its dense shapes. When the block ends it is shrunk by the checkpoint's
        plan, if there is one.

        Args:
            model: The model whose weights will be loaded.
            averages: Weight averages outside the model; their shapes change in the same way.
            checkpoint: The checkpoint, with the plan of a compacted network or without one.
            state_key: Key of the callback's state in the checkpoint.

        Raises:
            ValueError: If weights or plan do not fit the model, which then has the shapes it had before.
        """
        before = self.plan if self.model is model else None
        _apply_plan(model, averages, expand_, before)
        try:
            yield
            # a strategy that divides the model has loaded its weights by now, and removed them
            weights = compacted.weights_in(checkpoint) if "state_dict" in checkpoint else {}
            plan = compacted.plan_in(checkpoint, state_key)
            compacted.check_shapes(model, weights, compacted.plans_in(checkpoint))
            if plan is not None:
                compacted.check_weights(model, weights, [plan], getattr(model, "strict_loading", True))
        except BaseException:
            _apply_plan(model, averages, replay_, before)
            raise
        _apply_plan(model, averages, replay_, plan)
        if before is not None or plan is not None:
            self.reset()
        if plan is not None:
            self.model, self.plan = model, plan

    def state_dict(self) -> dict[str, Any]:
        """Return masks, statistics and plan: tensors and plain values only."""
        if self.pruner is not None:
            return self.pruner.state_dict()
        assert self.store is not None
        assert self.plan is not None
        assert self.record is not None
        return {
            "masks": self.store.state_dict(),
            "statistics": {},
            "left_out": self.record.left_out,
            "plan": self.plan.to_state(),
            "report": self.record.to_state(),
        }


def _apply_plan(
    model: nn.Module,
    averages: Iterable[Average],
    change: Callable[[nn.Module, Plan], object],
    plan: Plan | None,
) -> None:
    """Expand or replay a plan on a model and its averages, unless the plan is ``None``."""
    if plan is not None:
        change(model, plan)
        for average in averages:
            change(average.module, plan.renamed(average.names))
