"""The scores of a model's unit groups: what a criterion has observed of them, offered to a selector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_prune.criteria import Criterion
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.loss_passes import check_passes
from lightning_prune.statistics.input_hooks import LayerInput
from lightning_prune.statistics.losses import Losses, LossEvaluator
from lightning_prune.statistics.observations import Observations
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.masks import MaskStore
from lightning_prune.units.shards import to_local


class Scoring:
    """Scores unit groups by a criterion.

    Args:
        model: The model that the groups are of.
        criterion: Scores the units.
        selector: Chooses among them.
        groups: Each with the layers that read it, as far as the criterion observes their inputs.
        store: The masks, which tell the units that are still there.

    Attributes:
        observations: What the criterion has observed since the last event.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        selector: Selector,
        groups: Sequence[tuple[UnitGroup, Sequence[LayerInput]]],
        store: MaskStore,
    ) -> None:
        self._model = model
        self._criterion = criterion
        self._selector = selector
        self._groups = [group for group, _ in groups]
        self._store = store
        self.observations = Observations(criterion, groups, store.shards)

    def kept(self) -> dict[str, Tensor]:
        """Return which units are still there: group name to a bool a unit, not a copy for single weights."""
        return {group.name: self._kept(group) for group in self._groups}

    def _kept(self, group: UnitGroup) -> Tensor:
        part = group.slices[0]
        return part.kept(self._store.masks[part.name])

    def left_dense(self) -> dict[str, str]:
        """Return name to reason of the groups that are whole and cannot be scored now."""
        unseen = self.observations.unseen
        whole = (group for group in self._groups if group.name in unseen and self._is_whole(group))
        return {group.name: f"{self._criterion!r} has seen no step of it" for group in whole}

    def _is_whole(self, group: UnitGroup) -> bool:
        removed = torch.tensor(int(to_local(self._kept(group)).logical_not().any()))
        return int(self._store.shards.add_up(removed)) == 0

    def evaluator(self, losses: Losses | None, needs: Needs) -> LossEvaluator | None:
        """Return what evaluates the loss; ``None`` if it is not needed, or there are no losses."""
        if losses is None or Needs.LOSS not in needs:
            return None
        check_passes(self._criterion, self._groups)
        return LossEvaluator(self._model, losses)

    def candidates(self, evaluator: LossEvaluator | None) -> list[Candidates]:
        """Return the groups that can be scored now; the others wait, and do not count.

        Raises:
            RuntimeError: If there is none.
        """
        if evaluator is not None:
            self.observations.measure(self.kept(), evaluator)
        dtype = reduce(torch.promote_types, (group.dtype for group in self._groups))
        found = [
            Candidates(
                group,
                to_local(self._kept(group)),
                self._criterion,
                self.observations.statistics[group.name],
                dtype,
                self._store.shards,
            )
            for group in self._groups
            if self.observations.seen(group)
        ]
        if not found:
            raise self.nothing_seen(self._criterion.needs)
        return found

    def nothing_seen(self, needs: Needs) -> RuntimeError:
        """Return the error of an event that comes before anything was observed."""
        return RuntimeError(
            f"{self._criterion!r} with {self._selector!r} has seen no finite {needs.unseen} before the first"
            " pruning step."
        )
