"""The loss on batches held for it, on a copy of the network: what a loss would be if some units were gone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import math_attention, transfer
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import Slice

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
SumOverRanks: TypeAlias = Callable[[Tensor], Tensor]

# With more numbers in a batch, one variant after the other is as fast.
_TOGETHER, _SMALL = 16, 2**18


@dataclass(frozen=True, eq=False)
class Losses:
    """A loss and the batches to look at it on, for criteria and selectors that ask for it.

    Args:
        loss: Gives the mean loss of a network, a copy in evaluation mode, on a batch,
            which it leaves as it is: a 0-d tensor.
        batches: As ``loss`` takes them, on any device.
        add_up: Gives the sum of a tensor over all processes, where there are several.
        progress: Whether to show a progress bar.
    """

    loss: LossFunction
    batches: Sequence[Any]
    add_up: SumOverRanks = lambda tensor: tensor
    progress: bool = True


class LossEvaluator:
    """A copy of a network, in evaluation mode, to try the absence of units on.

    Args:
        model: Stays as it is.
        losses: What is looked at.

    Attributes:
        batches: How many there are in this process.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there is no batch.
    """

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        if not losses.batches:
            raise ValueError("batches=[] must be at least one: without it there is no loss to look at.")
        self._model = model
        self._losses = losses
        self._renew()
        self._device = next(iter(self._parameters.values())).device
        self._batches = [transfer(batch, self._device) for batch in losses.batches]
        self._together = _TOGETHER if _largest_numel(self._batches[0]) <= _SMALL else 1
        self.batches = len(self._batches)
        self.progress = losses.progress

    def _renew(self) -> None:
        self._network = copy_model(self._model).eval().requires_grad_(requires_grad=False)
        self._parameters = dict(self._network.named_parameters())
        self._buffers = [
            (module, name, buffer.clone())
            for module in self._network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def copies(self, parts: Iterable[Slice]) -> dict[str, Tensor]:
        """Name to parameter of the copy, which asks for gradients from now on."""
        return {part.name: self._parameters[part.name].requires_grad_() for part in parts}

    def differentiable(self, batches: int) -> Iterator[Tensor]:
        """The losses on the first ``batches``, one by one, which autograd can go back from, twice."""
        with torch.enable_grad(), math_attention(), self._alike():
            for batch in self._batches[:batches]:
                yield self._losses.loss(self._network, batch)

    def joint(self, value: Tensor) -> Tensor:
        """The mean over all processes of what each has found on its part of a batch."""
        return self.mean(value, 1)

    def mean(self, totals: Tensor, batches: int) -> Tensor:
        """Sums over some batches in this process, made means over those in all processes."""
        count = torch.tensor(float(batches), device=totals.device)
        mean: Tensor = self._losses.add_up(totals) / self._losses.add_up(count)
        return mean

    @torch.no_grad()
    def put(self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
        """Leaves these groups of the copy with some of their units.

        Args:
            groups: The others stay as they are.
            kept: Group name to bool, of the units' shape.
        """
        masked = [(part, kept[group.name]) for group in groups for part in group.masked]
        for part, _ in masked:
            self._parameters[part.name].copy_(part.weight)
        for part, units in masked:
            self._parameters[part.name].mul_(part.spread(units))

    @torch.no_grad()
    def loss(self, batches: int) -> Tensor:
        """The mean loss of the copy as it is, over the first ``batches``: a 0-d tensor."""
        batches = min(batches, self.batches)
        return self.mean(self._total(self._network, batches), batches)

    @torch.no_grad()
    def losses(self, group: UnitGroup, kept: Iterable[Tensor], batches: int) -> Tensor:
        """The mean losses of variants of one group, several at once where batches are small.

        Args:
            group: The rest of the copy stays as it is.
            kept: For each variant which units are there: bool, of the units' shape.
            batches: How many to look at.
        """
        batches = min(batches, self.batches)
        found: list[Tensor] = []
        variants = iter(kept)
        while several := list(islice(variants, self._together)):
            found += self._totals(group, several, batches)
        return self.mean(torch.stack(found), batches)

    def _totals(self, group: UnitGroup, kept: Sequence[Tensor], batches: int) -> Sequence[Tensor]:
        if self._together > 1:
            try:
                return self._at_once(group, torch.stack(tuple(kept)), batches).unbind()
            except Exception:  # a user's step may do what cannot be done for several networks at once
                self._together = 1
            self._renew()  # the attempt may have left its marks
        totals = []
        for units in kept:
            self.put([group], {group.name: units})
            totals.append(self._total(self._network, batches))
        self.put([group], {group.name: torch.ones_like(kept[0])})
        return totals

    def _at_once(self, group: UnitGroup, kept: Tensor, batches: int) -> Tensor:
        def total(units: Tensor) -> Tensor:
            masked: dict[str, Tensor] = {}
            for part in group.masked:
                weight = masked.get(part.name, part.weight.detach())
                masked[part.name] = weight * part.spread(units)
            named = {f"network.{name}": weight for name, weight in masked.items()}
            result: Tensor = functional_call(judged, named, ())
            return result

        judged = _LossModule(self._network, lambda network: self._total(network, batches))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # and it is faster still
            found: Tensor = vmap(total)(kept)
        return found

    def _total(self, network: nn.Module, batches: int) -> Tensor:
        with self._alike():
            losses = [self._losses.loss(network, batch) for batch in self._batches[:batches]]
        return torch.stack(losses).sum()

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """What a loss draws is the same each time, and not missing elsewhere; buffers are the model's."""
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        with torch.random.fork_rng({self._device} if self._device.type == "cuda" else ()):
            yield


class _LossModule(nn.Module):
    """A network whose output is its loss: what is called with other parameters must be a module."""

    def __init__(self, network: nn.Module, judge: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._judge = judge

    def forward(self) -> Tensor:
        """The loss."""
        return self._judge(self.network)


def _largest_numel(batch: Any) -> int:
    """How many numbers the largest tensor of a batch holds."""
    return max((leaf.numel() for leaf in tree_leaves(batch) if torch.is_tensor(leaf)), default=0)
