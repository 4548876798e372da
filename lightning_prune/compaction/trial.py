"""Tries cuts on copies of a model: only what comes out the same may ever be masked, or stay cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.compaction.plan import Kept, make_plan
from lightning_prune.compaction.replay import replay_
from lightning_prune.probe import Probe, evaluating, relative_difference
from lightning_prune.units import UnitGroup

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class _Bench:
    """A copy of a model in one precision, and what runs it."""

    model: nn.Module
    probe: Probe
    tolerance: float

    def run(self, model: nn.Module) -> Any:
        with evaluating(model):
            for other in self.probe.others:
                other(model)
            return self.probe(model)


class Trial:
    """Copies of a model: in single precision, to see roughly, and in double, where it runs in that, to be sure.

    Args:
        model: Stays as it is.
        probe: Runs it.
        ahead: Whether units that go are still there: weights are stirred, and what goes is set to 0 first.
            Otherwise the model is taken as it is.

    Raises:
        ValueError: If the model rejects the example, or gives something else each time.
    """

    def __init__(self, model: nn.Module, probe: Probe, *, ahead: bool) -> None:
        self._ahead = ahead
        self._rough = self._bench(model, probe, torch.float32)
        try:
            first, second = self._rough.run(self._rough.model), self._rough.run(self._rough.model)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        if relative_difference(first, second) > self._rough.tolerance:
            raise ValueError("the model gives different outputs for one example: no cut can be tried on it.")
        fine = self._bench(model, probe, torch.float64)
        try:
            fine.run(fine.model)
        except Exception:  # a user's forward may raise anything where a type is fixed in it
            fine = self._rough
        self._fine = fine

    def _bench(self, model: nn.Module, probe: Probe, dtype: torch.dtype) -> _Bench:
        twin = copy.deepcopy(model).to(dtype)
        if self._ahead:
            stir_(twin)
        return _Bench(twin, probe.to(dtype), _TOLERANCE[dtype])

    def failing(self, kept: Kept, *, rough: bool = False) -> dict[str, str]:
        """Group name to reason, for those that cannot be cut.

        All groups are cut at once; where that fails, halves are, down to those at fault.

        Args:
            kept: Groups, each with a bool a unit, False where it goes.
            rough: Whether single precision will do: it shows what is wrong, but not what is right.
        """
        if not kept:
            return {}
        why = self._fails(kept, self._rough if rough else self._fine)
        if why is None:
            return {}
        if len(kept) == 1:
            return {kept[0][0].name: why}
        middle = len(kept) // 2
        return self.failing(kept[:middle], rough=rough) | self.failing(kept[middle:], rough=rough)

    def _fails(self, kept: Kept, bench: _Bench) -> str | None:
        model = copy.deepcopy(bench.model)
        if self._ahead:
            _zero(model, kept)
        expected = bench.run(model)
        try:
            replay_(model, make_plan(model, kept))
            difference = relative_difference(expected, bench.run(model))
        except Exception as error:  # what a cut breaks in a user's forward may raise anything
            return f"cannot be cut: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if difference > bench.tolerance:
            return f"cannot be cut: outputs change by {difference:.1e}"
        return None


@torch.no_grad()
def _zero(model: nn.Module, kept: Kept) -> None:
    """Sets what is masked with each unit that goes to 0, in a model of the groups' architecture."""
    tensors = dict(model.named_parameters())
    for group, units in kept:
        for part in group.masked:
            tensors[part.name].mul_(part.spread(units.to(part.weight.device)))


def uneven(groups: Sequence[UnitGroup]) -> Kept:
    """About half of each group's units, without a pattern; neither all nor none."""
    generator = torch.Generator().manual_seed(0)
    return [(group, _half(group.size, generator)) for group in groups]


def _half(size: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(size, generator=generator)
    kept = torch.zeros(size, dtype=torch.bool)
    kept[order[: max(1, math.floor(size * 9 / 16))]] = True
    return kept


@torch.no_grad()
def stir_(model: nn.Module) -> None:
    """Moves all weights a little, so that none that is 0 or 1 hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            spread = 0.1 * tensor.abs().mean() + 0.01
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            # running variances stay above 0, everything else goes both ways
            tensor.add_(noise * spread if name.endswith("var") else (2 * noise - 1) * spread)
