"""The network that a callback prunes: bound, then perhaps compacted, brought back from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction import PLAN, Plan, compact_, expand_, replay_
from lightning_prune.core import schema
from lightning_prune.core.averages import Average
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import Probe
from lightning_prune.export.compacted import check_shapes, check_weights, plan_in, plans_in, weights_in
from lightning_prune.pruner import PRUNED, Pruner
from lightning_prune.report.measurement import layers_of, measure_compacted, measure_layers
from lightning_prune.report.report import REPORT, Layer, Report
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


def _pruned_network(state: Any) -> dict[str, Any]:
    compacted = schema.mapping(schema.anything)(state).get("plan") is not None
    return (_COMPACTED if compacted else PRUNED)(state)


PRUNED_NETWORK: schema.Reader[dict[str, Any]] = _pruned_network


class PrunedNetwork:
    """A network, and what became of it: pruned by a ``Pruner``, or compacted, when some masks may be left.

    Attributes:
        model: The network, ``None`` before one is bound.
        pruner: Prunes it; ``None`` once it is compacted.
        store: Its masks; after compaction those that are left.
        plan: How it was compacted, ``None`` if it was not.
        record: The report that was made then.
        layers: What the masks leave, as of the last :meth:`count`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is bound."""
        self.model: nn.Module | None = None
        self.pruner: Pruner | None = None
        self.store: MaskStore | None = None
        self.plan: Plan | None = None
        self.record: Report | None = None
        self.layers: tuple[Layer, ...] = ()
        self._saved: Mapping[str, Any] = {}

    def bound_to(self, model: nn.Module) -> bool:
        """Whether it is this network that is in charge, with its masks."""
        return self.model is model and self.store is not None

    @property
    def sharded(self) -> bool:
        """Whether processes hold a part of it each."""
        return self.store is not None and self.store.shards.sharded

    @property
    def covered(self) -> set[str]:
        """Names of the parameters whose units are chosen among."""
        groups = () if self.pruner is None else self.pruner.groups
        return {part.name for group in groups for part in group.slices}

    def bind(
        self, model: nn.Module, make: Callable[[], Pruner], state: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Takes charge of a network: the present one goes on from where it is, another one starts anew.

        Args:
            model: To be pruned.
            make: Gives what prunes it.
            state: Where that was, if it is to go on from there.

        Returns:
            What could not be taken over, in words.

        Raises:
            ValueError: If there is nothing to prune, or the state is not of this network; nothing has changed
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
        """Takes charge of a network as a state has it, masked or compacted: nothing more is pruned.

        Args:
            model: Of the shapes that the state's masks have.
            state: What :meth:`state_dict` gave, as ``SUBJECT`` reads it.

        Raises:
            ValueError: If its masks are not those of this network; nothing has changed then.
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
        """Looks at what the masks leave, in all processes together: a report asks none of them then."""
        assert self.store is not None
        self.layers = layers_of(self.store.masks, self.store.shards)

    @property
    def sparsity(self) -> float:
        """Removed share of the elements that the structure covers, as of the last :meth:`count`."""
        removed = sum(layer.size - cast(int, layer.kept) for layer in self.layers)
        return removed / sum(layer.size for layer in self.layers)

    def report(self, example: Any = None) -> Report:
        """The network as it stands.

        Args:
            example: Of ``forward``'s input, to count multiply-adds on.
        """
        if self.record is not None:
            return self.record
        assert self.model is not None
        assert self.store is not None
        if self.sharded:
            example = None  # a pass would need all processes
        model = self.model
        report = _measured(lambda shown: measure_layers(model, self.layers, shown), example)
        remarks = self._saved if self.pruner is None else self.pruner.remarks
        return replace(
            report,
            frozen=remarks["frozen"],
            protected=tuple(remarks["protected"]),
            left_out=remarks["left_out"],
        )

    def compact_(
        self,
        probe: Probe,
        example: Any,
        optimizers: Iterable[Optimizer],
        averages: Iterable[Average],
        report: Report,
    ) -> None:
        """Shrinks the network in place.

        Args:
            probe: Runs it.
            example: To measure the dense and the compacted network on, or ``None``.
            optimizers: Of its parameters.
            averages: Of it, and not within it, which shrink along with it.
            report: Of the masked network.

        Raises:
            CompactionError: If outputs differ; nothing has changed then.
        """
        assert self.pruner is not None
        model = cast(nn.Module, self.model)
        dense = copy_model(model)
        if isinstance(model, LightningModule):
            # which forward may read from, and a copy has not
            cast(LightningModule, dense).trainer = model.trainer
        self.plan, masks = compact_(model, self.pruner.masks, self.pruner.channel_groups, probe, optimizers)
        for average in averages:
            replay_(average.module, self.plan.renamed(average.names))
        self.store = MaskStore(model, masks)
        for name, mask in masks.items():
            self.store.masks[name].copy_(mask)
        self.pruner = None
        self.record = _measured(lambda shown: measure_compacted(report, dense, model, masks, shown), example)

    @contextmanager
    def loading(
        self, model: nn.Module, averages: Sequence[Average], checkpoint: Mapping[str, Any], state_key: str
    ) -> Iterator[None]:
        """A ``with`` block before weights are loaded: brings a network to the shapes that a checkpoint has.

        Within the block it has its dense shapes; at the end those of the checkpoint's plan, if there is one.

        Args:
            model: Is to be loaded.
            averages: Of it, and not within it.
            checkpoint: Has the plan, if any.
            state_key: Of the callback that has made it.

        Raises:
            ValueError: If they do not fit; the network is as it was then.
        """
        before = self.plan if self.model is model else None
        _apply_plan(model, averages, expand_, before)
        try:
            yield
            # a strategy that divides the model has loaded its weights already, and left none
            weights = weights_in(checkpoint) if "state_dict" in checkpoint else {}
            plan = plan_in(checkpoint, state_key)
            check_shapes(model, weights, plans_in(checkpoint))
            if plan is not None:
                check_weights(model, weights, [plan], getattr(model, "strict_loading", True))
        except BaseException:
            _apply_plan(model, averages, replay_, before)
            raise
        _apply_plan(model, averages, replay_, plan)
        if before is not None or plan is not None:
            self.reset()
        if plan is not None:
            self.model, self.plan = model, plan

    def state_dict(self) -> dict[str, Any]:
        """Masks, statistics, plan: tensors and plain values only."""
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


def _measured(measure: Callable[[Any], Report], example: Any) -> Report:
    """A report with what runs on an example, or without: a user's forward may raise anything."""
    try:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a report
            return measure(example)
    except Exception as error:  # which must not end a fit
        rank_zero_warn(f"The report goes without multiply-adds: forward failed with {error!r}.")
        return measure(None)


def _apply_plan(
    model: nn.Module,
    averages: Iterable[Average],
    change: Callable[[nn.Module, Plan], object],
    plan: Plan | None,
) -> None:
    """Does the same to a network and its averages, if there is a plan for it."""
    if plan is not None:
        change(model, plan)
        for average in averages:
            change(average.module, plan.renamed(average.names))
