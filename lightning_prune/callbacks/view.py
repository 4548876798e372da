"""What a callback tells of its network: of the one that it prunes, or of one in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_prune.callbacks.state import read_state
from lightning_prune.report.history import History
from lightning_prune.report.report import Report
from lightning_prune.training.fit_events import FitEvents
from lightning_prune.training.pruned_network import PrunedNetwork


@dataclass(frozen=True)
class View:
    """A network, and what happened on the way."""

    subject: PrunedNetwork
    history: History
    rounds: FitEvents

    @classmethod
    def of_saved(cls, model: nn.Module, state: Mapping[str, Any], rounds: FitEvents) -> View:
        """As a saved state has it.

        Args:
            model: With the weights that were saved beside it.
            state: What a callback has saved.
            rounds: Of the callback's settings, and new.

        Raises:
            ValueError: If it is no state, or not of this model, or a later version of lightning_prune wrote it.
        """
        saved = read_state(state)
        view = cls(PrunedNetwork(), History(), rounds)
        view.subject.bind_saved(model, saved["pruner"])
        view.history.load_state_dict(saved)
        view.rounds.load_state_dict(saved)
        return view

    def report(self, example: Any) -> Report:
        """All of it.

        Args:
            example: Of ``forward``'s input, to count multiply-adds on.
        """
        told = self.subject.report(example)
        entries = tuple(self.history.entries)
        return replace(told, monitor=self.history.monitor, history=entries, decisions=self.rounds.decisions)
