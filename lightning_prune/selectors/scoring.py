"""The scoring of unit groups: from a criterion's observations to the candidates that a selector gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_prune.core.clock import timed
from lightning_prune.criteria.base import Criterion
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.input_hooks import LayerInput
from lightning_prune.statistics.losses import Losses, LossEvaluator
from lightning_prune.statistics.observations import Observations
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.shards import to_local


@dataclass(eq=False)
class Scoring:
    """Scores the unit groups of a model by a criterion.

    Args:
        model: The model that the groups belong to.
        criterion: Scores the units.
        selector: Chooses the units to remove; named in errors.
        layers: Each unit group with the layers that read its units and whose inputs the criterion observes.
        store: The masks, which define the units that are kept.

    Attributes:
        observations: The criterion's observations since the last event.
    """

    model: nn.Module
    criterion: Criterion
    selector: Selector
    layers: Sequence[tuple[UnitGroup, Sequence[LayerInput]]]
    store: MaskStore

    def __post_init__(self) -> None:
        self._groups = [group for group, _ in self.layers]
        self.observations = Observations(self.criterion, self.layers, self.store.shards)

    def kept(self) -> dict[str, Tensor]:
        """Return the kept units: group name to one bool a unit; for single weights the mask itself, no copy."""
        return {group.name: self.kept_of(group) for group in self._groups}

    def kept_of(self, group: UnitGroup) -> Tensor:
        """Return the kept units of a group, as :meth:`kept` does."""
        return group.kept(self.store.masks)

    def left_dense(self) -> dict[str, str]:
        """Return the groups of which no unit is removed and that cannot be scored now: name to reason."""
        observed = self.observations.observed
        whole = (group for group in self._groups if not observed(group) and self._is_whole(group))
        return {group.name: f"{self.criterion!r} has seen no step of it" for group in whole}

    def _is_whole(self, group: UnitGroup) -> bool:
        removed = torch.tensor(int(to_local(self.kept_of(group)).logical_not().any()))
        return int(self.store.shards.add_up(removed)) == 0

    def evaluator(self, losses: Losses | None, needs: Needs) -> LossEvaluator | None:
        """Return the evaluator of the loss, or ``None`` if it is not needed or there are no losses.

        Args:
            losses: The loss and its batches.
            needs: The quantities that the event needs.

        Raises:
            ValueError: If the criterion would take more passes through the network than it allows.
        """
        if losses is None or Needs.LOSS not in needs:
            return None
        self._check_passes()
        return LossEvaluator(self.model, losses)

    def _check_passes(self, time_taken: str = "") -> None:
        criterion, passes = self.criterion, self.criterion.passes(self._groups)
        if passes > criterion.max_passes:
            raise ValueError(
                f"{criterion!r} would take {passes:,} passes of a batch through the network in one"
                f" event{time_taken}: raise max_passes={criterion.max_passes!r}, {criterion.fewer_passes}, or"
                " take another criterion."
            )

    def estimate_seconds(self, losses: Losses) -> float:
        """Return how many seconds an event is likely to spend on loss evaluations, measured on the first batch.

        Raises:
            ValueError: If the criterion would take more passes through the network than it allows.
        """
        evaluator = LossEvaluator(self.model, Losses(losses.loss, losses.batches[:1]))
        evaluator.loss(1)  # the first pass takes longer
        # numbers, for which an accelerator is waited for
        one_pass = timed(lambda: float(self.criterion.rehearse(self._groups, evaluator)))
        asked = self.criterion.passes(self._groups) * one_pass
        self._check_passes(f", about {asked / 60:.3g} minutes here")
        return asked + self.selector.passes(self._groups) * timed(lambda: float(evaluator.loss(1)))

    def candidates(
        self, evaluator: LossEvaluator | None, calibration: Calibration | None = None
    ) -> list[Candidates]:
        """Return the groups that can be scored now; the others do not take part in this event.

        Args:
            evaluator: Evaluates the loss, if the criterion needs it.
            calibration: Passes of the model, if the criterion needs them.

        Raises:
            RuntimeError: If no group can be scored.
        """
        if evaluator is not None:
            self.observations.measure(self.kept(), evaluator)
        if calibration is not None and calibration.passes and Needs.CALIBRATION in self.criterion.needs:
            self.observations.calibrate(self.kept(), self.model, calibration)
        dtype = reduce(torch.promote_types, (group.dtype for group in self._groups))
        statistics, shards = self.observations.statistics, self.store.shards
        found = [
            Candidates(
                group, to_local(self.kept_of(group)), self.criterion, statistics[group.name], dtype, shards
            )
            for group in self._groups
            if self.observations.observed(group)
        ]
        if not found:
            raise self.nothing_seen(self.criterion.needs)
        return found

    def nothing_seen(self, needs: Needs) -> RuntimeError:
        """Return the error to raise at an event without an observation since the last one."""
        text = f"{self.criterion!r} with {self.selector!r} has seen no finite {needs.missing}"
        whole = all(map(self._is_whole, self._groups))
        return RuntimeError(f"{text}." if whole else f"Since the last pruning step {text}.")
