"""Trial cuts on copies of a model, which show for which unit groups a cut leaves the outputs the same."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.plan import Kept, make_plan
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.channels.graph.recorder import OpRecorder
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.probes import Deadline, Probe, evaluation_mode, relative_difference
from lightning_prune.units.groups import UnitGroup

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


class CutTrial:
    """Compares the outputs of a cut copy of a model with those of a masked one.

    Trials run in single precision, as a quick first check, until :meth:`use_double_precision` is called.

    Args:
        model: Is not changed.
        probe: Runs the model.
        masked: Whether the weights of the units to cut are 0 already; then all weights are used as they are.
            Otherwise the weights of the copies are perturbed, and the masked copy has those of the units at 0.
        deadline: When trials have to end; ``None`` for no limit.

    Raises:
        ValueError: If the model cannot run on the example, or gives different outputs for it each time.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, *, masked: bool, deadline: Deadline | None = None
    ) -> None:
        self._model, self._masked, self._deadline = model, masked, deadline
        self._dtype, self._probe = torch.float32, probe.to(torch.float32)
        # single-precision trials are many: their copies share the memory of this one, except changed weights
        self._shared: nn.Module | None = self._full_copy()
        try:
            first, second = self._run(self._shared), self._run(self._shared)
        except Exception as error:  # a user's forward may raise anything
            raise ValueError(f"{type(model).__name__} cannot run on the example: {error!r}") from error
        if not first:
            raise ValueError(
                f"{type(model).__name__} gives no tensor to compare: let forward return its outputs."
            )
        if relative_difference(first, second) > _TOLERANCE[self._dtype]:
            raise ValueError("the model gives different outputs for one example: no cut can be tried on it.")

    def _full_copy(self) -> nn.Module:
        model = copy_model(self._model).to(self._dtype)
        if not self._masked:
            perturb_(model)
        return model

    def _run(self, model: nn.Module) -> list[Tensor]:
        """Run the model, and return all tensors that outlive the pass."""
        with evaluation_mode(model):
            for other in self._probe.further_passes:
                other(model)
            with OpRecorder(model) as recorder:
                result = self._probe(model)
            outputs: list[Tensor] = recorder.outputs(result)
        return outputs

    def _copy(self, own: Container[str] = ()) -> nn.Module:
        """Return a copy of the model in the precision of the trials.

        Args:
            own: Names of parameters that the caller changes in place. Others may share their memory with the
                copies of other trials: only their ``data`` attribute may be set.
        """
        return self._full_copy() if self._shared is None else copy_sharing_weights(self._shared, own)

    def _cut_copy(self, kept: Kept) -> nn.Module:
        model = self._copy()
        replay_(model, make_plan(model, kept))
        return model

    @torch.no_grad()
    def _masked_copy(self, kept: Kept) -> nn.Module:
        parts = [] if self._masked else [(part, units) for group, units in kept for part in group.masked]
        model = self._copy({part.name for part, _ in parts})
        for part, units in parts:
            weight = model.get_parameter(part.name)
            # in the weight's dtype, since any other would be converted after it is expanded to full size
            weight.mul_(part.spread(units.to(weight)))
        return model

    def use_double_precision(self) -> None:
        """Switch to double precision, if the model runs in it, and keep only one copy in memory at a time."""
        self._shared = None
        single, self._dtype, self._probe = self._probe, torch.float64, self._probe.to(torch.float64)
        try:
            self._run(self._full_copy())
        except Exception:  # a user's forward may raise anything where its dtype is hard-coded
            self._dtype, self._probe = torch.float32, single

    def failing(self, kept: Kept, passed: Kept = ()) -> dict[str, str]:
        """Return the groups that cannot be cut, name to reason; all others can be cut together.

        All groups are cut at once. If that fails, the first half is tried, then the second half together with
        the groups of the first that passed, and so on by bisection. A group that fails in single precision
        cannot be cut; one that passes may still fail in double precision.

        Args:
            kept: The groups to test, each with a bool mask over its units, False for a unit to cut.
            passed: Groups that have passed, in the same form, which are cut as well.

        Raises:
            ValueError: If the deadline has passed.
        """
        if not kept:
            return {}
        reason = self._failure([*passed, *kept])
        if reason is None:
            return {}
        if len(kept) == 1:
            return {kept[0][0].name: reason}
        middle = len(kept) // 2
        failing = self.failing(kept[:middle], passed)
        passing = [each for each in kept[:middle] if each[0].name not in failing]
        return failing | self.failing(kept[middle:], [*passed, *passing])

    def _failure(self, kept: Kept) -> str | None:
        """Return why these groups cannot be cut together; ``None`` if they can."""
        if self._deadline is not None:
            self._deadline.check()
        try:  # the cut copy runs first, since most failing cuts raise an error
            found = self._run(self._cut_copy(kept))
        except Exception as error:  # a user's forward may raise anything when shapes do not fit
            return f"cannot be cut: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        difference = relative_difference(self._run(self._masked_copy(kept)), found)
        if difference > _TOLERANCE[self._dtype]:
            return f"cannot be cut: outputs change by {difference:.1e}"
        return None


def uneven_cut(groups: Sequence[UnitGroup]) -> Kept:
    """Return for each group a random choice of units to keep, from a fixed seed: 9/16, rounded down."""
    generator = torch.Generator().manual_seed(0)
    kept = []
    for group in groups:
        ranks = torch.randperm(group.size, generator=generator).argsort()
        kept.append((group, ranks < max(1, group.size * 9 // 16)))
    return kept


@torch.no_grad()
def perturb_(model: nn.Module) -> None:
    """Add noise to all floating-point parameters and buffers, so that no 0 or 1 among them hides a wrong cut.

    Noise is uniform, from a fixed seed, with an amplitude of 0.01 plus a tenth of the tensor's mean absolute
    value.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            spread = 0.1 * torch.linalg.vector_norm(tensor, 1) / tensor.numel() + 0.01
            # in pieces: noise for a whole tensor at once would need as much memory as the tensor
            for piece in torch.atleast_1d(tensor).chunk(64):
                noise = torch.rand(piece.shape, generator=generator, dtype=piece.dtype).to(piece.device)
                # positive noise for running variances, which have to stay above 0
                noise = noise if name.endswith("var") else noise.mul_(2).sub_(1)
                piece.add_(noise.mul_(spread))
