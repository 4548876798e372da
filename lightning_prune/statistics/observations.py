"""Observations: the running sums that a criterion keeps of each unit group between two pruning events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.core.parts import describe
from lightning_prune.core.tensors import dense
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.input_hooks import InputHooks, LayerInput
from lightning_prune.statistics.losses import LossEvaluator
from lightning_prune.statistics.observer import Needs, Observer
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.shards import Shards, Unsharded, to_local

_AT_EVENTS = Needs.LOSS | Needs.CALIBRATION  # what is measured at an event, not before it


class Observations:
    """The running sums of all groups since the last pruning event.

    Args:
        criterion: Computes what is added to the sums.
        groups: Each group with the layers that read it, as far as the criterion observes their inputs.
        shards: The processes among which rows of the groups are divided.

    Attributes:
        statistics: Group name to its sums.
    """

    def __init__(
        self,
        criterion: Observer,
        groups: Sequence[tuple[UnitGroup, Sequence[LayerInput]]],
        shards: Shards = Unsharded(),
    ) -> None:
        self._criterion = criterion
        self._shards = shards
        self._layers = self._whole = groups
        self._sizes = {group.name: group.size for group, _ in groups}
        self._places: Mapping[str, Tensor] = {}
        self.statistics = {
            group.name: _zero_sums(criterion, group.here, bool(layers)) for group, layers in groups
        }
        device = self.groups[0].slices[0].weight.device
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def groups(self) -> list[UnitGroup]:
        """The groups as they are observed: of the network that trains, which may be cut."""
        return [group for group, _ in self._layers]

    @property
    def narrow(self) -> bool:
        """Whether the groups are those after a cut."""
        return bool(self._places)

    def narrow_(
        self, groups: Sequence[tuple[UnitGroup, Sequence[LayerInput]]], places: Mapping[str, Tensor]
    ) -> None:
        """Go on with the units that a cut of the network has left; the sums of the others are dropped.

        Args:
            groups: As for the constructor, of the network after the cut.
            places: Group name to the numbers that its units had before the cut.
        """
        self._layers, self._places = groups, dict(places)
        self.statistics = {name: each.of_units(places[name]) for name, each in self.statistics.items()}

    def widen_(self) -> None:
        """Go on with the whole groups again; the sums of the units that were cut are 0."""
        self.statistics, self._layers, self._places = self._whole_statistics(), self._whole, {}

    def _whole_statistics(self) -> dict[str, Statistics]:
        if not self.narrow:
            return self.statistics
        return {
            name: each.among(self._places[name], self._sizes[name]) for name, each in self.statistics.items()
        }

    @property
    def left_out(self) -> int:
        """Number of observations that were left out, because a value was inf or nan."""
        return int(self._skipped)

    def observed(self, group: UnitGroup) -> bool:
        """Return whether a group can be scored: the criterion needs no observation of it, or has one."""
        return not self._criterion.needs or int(self.statistics[group.name].count) > 0

    @property
    def ready(self) -> bool:
        """Whether some group can be scored; some criteria only need batches to run the network on."""
        return bool(_AT_EVENTS & self._criterion.needs) or any(self.observed(group) for group in self.groups)

    @property
    def unobserved(self) -> dict[str, bool]:
        """Name of each group without an observation, to whether any of its weights is trained."""
        if _AT_EVENTS & self._criterion.needs:
            return {}
        return {
            group.name: any(part.weight.requires_grad for part in group.slices)
            for group in self.groups
            if not self.observed(group)
        }

    def input_hooks(self) -> InputHooks | None:
        """Return hooks that observe activations for these sums; ``None`` if the criterion needs none."""
        if (observer := self._criterion.activations) is None:
            return None
        return InputHooks(observer, self._layers, self.statistics, self._skipped)

    @torch.no_grad()
    def add(self, grads: Mapping[str, Tensor] | None) -> None:
        """Add the gradients of one training step to the sums, or count the step as left out.

        Args:
            grads: Parameter name to gradient; by default the ``.grad`` of each parameter.
        """
        found = [(group.here, _group_gradients(group, grads)) for group in self.groups]
        observed = [(group, present) for group, present in found if present is not None]
        if not observed:
            return
        valid = self._finite([grad for _, present in observed for grad in present])
        self._skipped += ~valid
        for group, present in observed:
            statistics = self.statistics[group.name]
            here = valid.to(statistics.count.device)
            for start, stop in self._criterion.pieces(group):
                rows = [
                    part.rows(grad, start, stop).to(group.dtype)
                    for part, grad in zip(group.slices, present, strict=True)
                ]
                addends = self._criterion.observe(group.rows(start, stop), rows)
                statistics.rows(start, stop).add_(addends, here)
            statistics.count.add_(here)

    def _finite(self, grads: list[Tensor]) -> Tensor:
        """Return whether all gradients in all processes are finite, as a tensor: no wait for the device."""
        extremes = [value for grad in grads if grad.numel() for value in grad.aminmax()]
        wrong = [~value.isfinite().to(self._skipped.device) for value in extremes]
        return self._shards.add_up(torch.stack(wrong).sum() if wrong else torch.zeros_like(self._skipped)) == 0

    @torch.no_grad()
    def measure(self, kept: Mapping[str, Tensor], evaluator: LossEvaluator) -> None:
        """Let the criterion evaluate losses, if it does, and replace the sums by its results.

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
            evaluator: Evaluates the loss on a copy of the network, with its current weights.
        """
        self._replace(self._criterion.measure(self.groups, kept, evaluator))

    @torch.no_grad()
    def calibrate(self, kept: Mapping[str, Tensor], model: nn.Module, calibration: Calibration) -> None:
        """Let the criterion look at the inputs of layers, if it does, and replace the sums by its results.

        Args:
            kept: Group name to a bool mask of its units, True where a unit is kept.
            model: The network, with its current weights.
            calibration: Passes of the network.
        """
        self._replace(self._criterion.calibrate(self.groups, kept, model, calibration))

    def _replace(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, sums in found.items():
            statistics = self.statistics[name]
            statistics.reset_()
            statistics.add_(sums, torch.tensor(True))
            statistics.count.fill_(1)

    def reset_(self) -> None:
        """Set all sums to 0."""
        for statistics in self.statistics.values():
            statistics.reset_()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, of whole groups; divided sums are gathered in the first process."""
        statistics = self._whole_statistics()
        gathered = {
            group.name: statistics[group.name].view(partial(self._shards.gather, shape=group.shape))
            for group, _ in self._whole
        }
        return {
            "criterion": describe(self._criterion),
            "statistics": {name: each.state_dict() for name, each in gathered.items()},
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Load saved sums, which must be as ``PRUNED`` in ``pruned_state.py`` reads them.

        If the sums of one group do not fit, none are loaded, because groups compare their scores.

        Returns:
            Messages about what was not loaded: sums of another criterion, or of other groups.
        """
        self._skipped.fill_(state["left_out"])
        try:
            self._load(state)
        except ValueError as error:
            self.reset_()
            return [f"statistics start anew: {error}".rstrip(".")] if self._criterion.needs else []
        return []

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["criterion"] != describe(self._criterion):
            raise ValueError(f"those of the state are of {state['criterion'] or 'an unknown criterion'}.")
        for name, statistics in self.statistics.items():
            if name not in state["statistics"]:
                raise ValueError(f"the state has none of {name!r}.")
            saved = state["statistics"][name]
            sums = {key: self._shards.own(each) for key, each in saved["sums"].items()}
            statistics.load_state_dict({**saved, "sums": sums})


def _zero_sums(criterion: Observer, group: UnitGroup, watched: bool) -> Statistics:
    """Return sums of zeros for a group; ``watched`` if the inputs of its readers are observed."""
    weight = group.slices[0].weight.detach()
    like = weight if group.divisible else weight.new_empty(group.shape)
    return Statistics.zeros(criterion.sums, like, group.dtype, group.inputs if watched else 0)


def _group_gradients(group: UnitGroup, grads: Mapping[str, Tensor] | None) -> list[Tensor] | None:
    """Return the local gradient of each slice of a group; ``None`` if there is no gradient at all.

    Weights without one, which are frozen or take no part in the step, have zeros.
    """
    found = [part.weight.grad if grads is None else grads.get(part.name) for part in group.slices]
    if all(grad is None for grad in found):
        return None
    return [
        torch.zeros_like(to_local(part.weight)) if grad is None else dense(to_local(grad))
        for part, grad in zip(group.slices, found, strict=True)
    ]
