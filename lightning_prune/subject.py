"""The network that a callback prunes: bound, then perhaps compacted, brought back from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.compaction import Plan, compact_, expand_, replay_
from lightning_prune.loading import check_fits, plan_of, plans_of
from lightning_prune.masks import MaskStore
from lightning_prune.measuring import layers_of, measure_compacted, measure_layers
from lightning_prune.probe import Probe, twin_of
from lightning_prune.pruner import Pruner
from lightning_prune.report import Layer, Report
from lightning_prune.shards import shards_of


class Subject:
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
        self.forget()

    def forget(self) -> None:
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
    def divided(self) -> bool:
        """Whether processes hold a part of it each."""
        return self.store is not None and self.store.shards.divided

    @property
    def chosen(self) -> set[str]:
        """Names of the parameters whose units are chosen among."""
        groups = () if self.pruner is None else self.pruner.groups
        return {part.name for group in groups for part in group.slices}

    def bind(self, model: nn.Module, make: Callable[[], Pruner]) -> None:
        """Takes charge of a network: the present one goes on from where it is, another one starts anew."""
        if not self.bound_to(model):
            self.forget()
            self.model, self.pruner = model, make()
            self.store = self.pruner.store

    def bind_saved(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Takes charge of a network as a state has it, masked or compacted: nothing more is pruned.

        Args:
            model: Of the shapes that the state's masks have.
            state: What :meth:`state_dict` gave.
        """
        self.forget()
        self.model, self.store = model, MaskStore(model, (), shards_of(model))
        self.store.load_state_dict(state["masks"])
        self.store.apply_()
        self._saved = state
        if state["plan"] is not None:
            self.plan, self.record = Plan.from_state(state["plan"]), Report.from_state(state["report"])
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
        if self.divided:
            example = None  # a pass would need all processes
        try:
            with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a report
                report = measure_layers(self.model, self.layers, example)
        except Exception as error:  # a user's forward may raise anything, and a report must not end a fit
            rank_zero_warn(f"The report goes without multiply-adds: forward failed with {error!r}.")
            report = measure_layers(self.model, self.layers)
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
        copies: Iterable[nn.Module],
        report: Report,
    ) -> None:
        """Shrinks the network in place.

        Args:
            probe: Runs it.
            example: To measure the dense and the compacted network on, or ``None``.
            optimizers: Of its parameters.
            copies: Averages of it, which shrink along with it.
            report: Of the masked network.

        Raises:
            CompactionError: If outputs differ; nothing has changed then.
        """
        assert self.pruner is not None
        model = cast(nn.Module, self.model)
        dense = twin_of(model)
        self.plan, masks = compact_(model, self.pruner.masks, self.pruner.channel_groups, probe, optimizers)
        for copy in copies:
            replay_(copy, self.plan)
        self.record = measure_compacted(report, dense, model, masks, example)
        self.store = MaskStore(model, masks)
        for name, mask in masks.items():
            self.store.masks[name].copy_(mask)
        self.pruner = None

    def before_load(self, model: nn.Module, copies: Iterable[nn.Module]) -> None:
        """Gives this network its dense shapes back, if it is compacted: the checkpoint may be older.

        Args:
            model: Is to be loaded.
            copies: Averages of it.
        """
        if self.model is model and self.plan is not None:
            for each in (model, *copies):
                expand_(each, self.plan)
            self.forget()

    def after_load(
        self, model: nn.Module, copies: Iterable[nn.Module], checkpoint: Mapping[str, Any], state_key: str
    ) -> None:
        """Brings a dense network to the shapes that a checkpoint has, as its plan says.

        Args:
            model: Is to be loaded.
            copies: Averages of it.
            checkpoint: Has the plan, if any.
            state_key: Of the callback that has made it.

        Raises:
            ValueError: If they do not fit.
        """
        plan = plan_of(checkpoint, state_key)
        # a strategy that divides the model has loaded its weights already, and left none
        check_fits(model, checkpoint.get("state_dict", {}), plans_of(checkpoint))
        if plan is not None:
            for each in (model, *copies):
                replay_(each, plan)
            self.forget()
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
