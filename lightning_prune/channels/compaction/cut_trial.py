"""Tries cuts on copies of a model: only what comes out the same may ever be masked, or stay cut."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.plan import Kept, make_plan
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.probes import Deadline, Probe, evaluation_mode, relative_difference
from lightning_prune.units.groups import UnitGroup

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class CutTrial:
    """Cuts copies of a model: in single precision, to see roughly, then in double, where it runs in that.

    Args:
        model: Stays as it is.
        probe: Runs it.
        ahead: Whether units that go are still there: weights are stirred, and what goes is set to 0 first.
            Otherwise the model is taken as it is.
        deadline: Until when it may go on.

    Raises:
        ValueError: If the model rejects the example, or gives something else each time.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, *, ahead: bool, deadline: Deadline | None = None
    ) -> None:
        self._model, self._ahead, self._deadline = model, ahead, deadline
        self._dtype, self._probe = torch.float32, probe.to(torch.float32)
        # trials are many at first, and share what they leave alone
        self._whole: nn.Module | None = self._fresh()
        try:
            first, second = self._run(self._whole), self._run(self._whole)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        if relative_difference(first, second) > _TOLERANCE[self._dtype]:
            raise ValueError("the model gives different outputs for one example: no cut can be tried on it.")

    def _fresh(self) -> nn.Module:
        model = copy_model(self._model).to(self._dtype)
        if self._ahead:
            perturb_(model)
        return model

    def _run(self, model: nn.Module) -> Any:
        with evaluation_mode(model):
            for other in self._probe.others:
                other(model)
            return self._probe(model)

    def _copied(self, own: Container[str] = ()) -> nn.Module:
        """A copy to change: in its parameters' ``data``, or in those named in place."""
        return self._fresh() if self._whole is None else copy_sharing_weights(self._whole, own)

    def _shrunk(self, kept: Kept) -> nn.Module:
        model = self._copied()
        replay_(model, make_plan(model, kept))
        return model

    @torch.no_grad()
    def _masked(self, kept: Kept) -> nn.Module:
        parts = [(part, units) for group, units in kept for part in group.masked] if self._ahead else []
        model = self._copied({part.name for part, _ in parts})
        for part, units in parts:
            weight = model.get_parameter(part.name)
            weight.mul_(part.spread(units.to(weight)))  # of another type, it would be converted at full size
        return model

    def sharpen(self) -> None:
        """Goes on in double precision, if the model runs in that, with one copy at a time."""
        if self._whole is None:
            return
        self._whole = None
        rough, self._dtype, self._probe = self._probe, torch.float64, self._probe.to(torch.float64)
        try:
            self._run(self._fresh())
        except Exception:  # a user's forward may raise anything where a type is fixed in it
            self._dtype, self._probe = torch.float32, rough

    def failing(self, kept: Kept, beside: Kept = ()) -> dict[str, str]:
        """Group name to reason, for those that cannot be cut; the others can, all together.

        All groups are cut at once; where that fails, one half is, and then the other beside what is right of
        the first, down to those at fault. In single precision that shows what is wrong, but not what is right.

        Args:
            kept: Groups, each with a bool a unit, False where it goes.
            beside: The same of groups that are cut along with them, and can be.

        Raises:
            ValueError: If the deadline is past.
        """
        if not kept:
            return {}
        why = self._fails([*beside, *kept])
        if why is None:
            return {}
        if len(kept) == 1:
            return {kept[0][0].name: why}
        middle = len(kept) // 2
        faults = self.failing(kept[:middle], beside)
        right = [each for each in kept[:middle] if each[0].name not in faults]
        return faults | self.failing(kept[middle:], [*beside, *right])

    def _fails(self, kept: Kept) -> str | None:
        if self._deadline is not None:
            self._deadline.check()
        try:  # the smaller one first, since most that fail end in an error
            found = self._run(self._shrunk(kept))
        except Exception as error:  # what a cut breaks in a user's forward may raise anything
            return f"cannot be cut: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        difference = relative_difference(self._run(self._masked(kept)), found)
        if difference > _TOLERANCE[self._dtype]:
            return f"cannot be cut: outputs change by {difference:.1e}"
        return None


def uneven_cut(groups: Sequence[UnitGroup]) -> Kept:
    """About half of each group's units, without a pattern; neither all nor none."""
    generator = torch.Generator().manual_seed(0)
    return [(group, _random_half(group.size, generator)) for group in groups]


def _random_half(size: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(size, generator=generator)
    kept = torch.zeros(size, dtype=torch.bool)
    kept[order[: max(1, math.floor(size * 9 / 16))]] = True
    return kept


@torch.no_grad()
def perturb_(model: nn.Module) -> None:
    """Moves all weights a little, so that none that is 0 or 1 hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            spread = 0.1 * torch.linalg.vector_norm(tensor, 1) / tensor.numel() + 0.01
            # noise for all of a large one at once would take as much again
            for piece in torch.atleast_1d(tensor).chunk(64):
                noise = torch.rand(piece.shape, generator=generator, dtype=piece.dtype).to(piece.device)
                # running variances stay above 0, everything else goes both ways
                noise = noise if name.endswith("var") else noise.mul_(2).sub_(1)
                piece.add_(noise.mul_(spread))
