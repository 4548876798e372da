"""The mean loss on calibration batches, evaluated on a copy of the network without some of its units."""

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

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.probes import math_attention, tensors_in
from lightning_prune.core.tensors import cast_or_move
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import Slice

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
SumOverRanks: TypeAlias = Callable[[Tensor], Tensor]

# How many variants are evaluated at once, and up to how many elements in the largest tensor of a batch: with
# more, evaluating them one by one is as fast.
_TOGETHER, _SMALL = 16, 2**18


@dataclass(frozen=True, eq=False)
class Losses:
    """A loss function and calibration batches, for criteria and selectors that evaluate the loss.

    Args:
        loss: Returns the mean loss of a network on a batch, as a 0-d tensor. The network is a copy in
            evaluation mode. The function must not change the batch.
        batches: Batches in the form that ``loss`` takes, on any device.
        add_up: Returns the sum of a tensor over all processes, where there are several.
        progress: Whether to show a progress bar.
    """

    loss: LossFunction
    batches: Sequence[Any]
    add_up: SumOverRanks = lambda tensor: tensor
    progress: bool = True


class LossEvaluator:
    """Evaluates the loss on a copy of a network in evaluation mode, with some of its units removed.

    Args:
        model: The network; it is not changed.
        losses: The loss function and the batches.

    Attributes:
        batches: Number of batches in this process.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there is no batch.
    """

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        if not losses.batches:
            raise ValueError("batches=[] must be at least one: without it there is no loss to look at.")
        self._model = model
        self._losses = losses
        self._copy_model()
        self._device = next(iter(self._parameters.values())).device
        self._batches = [cast_or_move(batch, self._device) for batch in losses.batches]
        self._together = _TOGETHER if _largest_numel(self._batches[0]) <= _SMALL else 1
        self.batches = len(self._batches)
        self.progress = losses.progress

    def _copy_model(self) -> None:
        self._network = copy_model(self._model).eval().requires_grad_(requires_grad=False)
        self._parameters = dict(self._network.named_parameters())
        self._buffers = [
            (module, name, buffer.clone())
            for module in self._network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def parameters_of(self, parts: Iterable[Slice]) -> dict[str, Tensor]:
        """Return the copy's parameters that the slices are of, by name, and make them require gradients."""
        return {part.name: self._parameters[part.name].requires_grad_() for part in parts}

    def differentiable(self, batches: int) -> Iterator[Tensor]:
        """Yield the loss on each of the first ``batches``, in a form that autograd can differentiate twice."""
        with torch.enable_grad(), math_attention(), self._reproducible():
            for batch in self._batches[:batches]:
                yield self._losses.loss(self._network, batch)

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """Return the mean over all processes of a value that each has computed on its part of a batch."""
        return self.mean(value, 1)

    def mean(self, totals: Tensor, batches: int) -> Tensor:
        """Return the mean over the batches of all processes.

        Args:
            totals: Sums over batches in this process.
            batches: Number of these batches.
        """
        count = torch.tensor(float(batches), device=totals.device)
        mean: Tensor = self._losses.add_up(totals) / self._losses.add_up(count)
        return mean

    @torch.no_grad()
    def set_kept(self, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> None:
        """Set groups of the copy to the weights of the model, with removed units set to 0.

        Args:
            groups: The groups; other parameters of the copy do not change.
            kept: Group name to a bool tensor of the units' shape, True where a unit is kept.
        """
        masked = [(part, kept[group.name]) for group in groups for part in group.masked]
        for part, _ in masked:
            self._parameters[part.name].copy_(part.weight)
        for part, units in masked:
            self._parameters[part.name].mul_(part.spread(units))

    @torch.no_grad()
    def loss(self, batches: int) -> Tensor:
        """Return the mean loss of the copy, as it is, over the first ``batches``: a 0-d tensor."""
        batches = min(batches, self.batches)
        return self.mean(self._total(self._network, batches), batches)

    @torch.no_grad()
    def losses(self, group: UnitGroup, kept: Iterable[Tensor], batches: int) -> Tensor:
        """Return the mean loss of each variant of one group, evaluated several at once if batches are small.

        Args:
            group: The group; other parameters keep the values that they have in the copy.
            kept: For each variant a bool tensor of the units' shape, True where a unit is kept.
            batches: Number of batches to average over.

        Returns:
            One loss a variant.
        """
        batches = min(batches, self.batches)
        found: list[Tensor] = []
        variants = iter(kept)
        while chunk := list(islice(variants, self._together)):
            found += self._totals(group, chunk, batches)
        return self.mean(torch.stack(found), batches)

    def _totals(self, group: UnitGroup, kept: Sequence[Tensor], batches: int) -> Sequence[Tensor]:
        if self._together > 1:
            try:
                return self._at_once(group, torch.stack(tuple(kept)), batches).unbind()
            except Exception:  # a user's loss may contain what vmap does not support
                self._together = 1
            self._copy_model()  # the attempt may have changed the copy
        totals = []
        for units in kept:
            self.set_kept([group], {group.name: units})
            totals.append(self._total(self._network, batches))
        self.set_kept([group], {group.name: torch.ones_like(kept[0])})
        return totals

    def _at_once(self, group: UnitGroup, kept: Tensor, batches: int) -> Tensor:
        def total(units: Tensor) -> Tensor:
            masked: dict[str, Tensor] = {}
            for part in group.masked:
                weight = masked.get(part.name, part.weight.detach())
                masked[part.name] = weight * part.spread(units)
            named = {f"network.{name}": weight for name, weight in masked.items()}
            result: Tensor = functional_call(loss_module, named, ())
            return result

        loss_module = _LossModule(self._network, lambda network: self._total(network, batches))
        with warnings.catch_warnings():
            # of ops that vmap loops over: it is faster than a loop over variants even so
            warnings.filterwarnings("ignore", "There is a performance drop")
            found: Tensor = vmap(total)(kept)
        return found

    def _total(self, network: nn.Module, batches: int) -> Tensor:
        with self._reproducible():
            losses = [self._losses.loss(network, batch) for batch in self._batches[:batches]]
        return torch.stack(losses).sum()

    @contextmanager
    def _reproducible(self) -> Iterator[None]:
        """Make evaluations in a ``with`` block comparable, and free of side effects.

        Buffers start with the model's values, and random numbers are the same each time; the global random
        state is restored afterwards.
        """
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer.clone()
        with torch.random.fork_rng({self._device} if self._device.type == "cuda" else ()):
            yield


class _LossModule(nn.Module):
    """A module that returns the loss of a network, since ``functional_call`` takes a module."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self) -> Tensor:
        """Return the loss."""
        return self._loss(self.network)


def _largest_numel(batch: Any) -> int:
    """Return the number of elements of the largest tensor in a batch; 0 if there is none."""
    return max((tensor.numel() for tensor in tensors_in(batch)), default=0)
