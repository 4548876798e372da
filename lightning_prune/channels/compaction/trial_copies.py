"""Copies of a model that trials run: whole, with units masked, or with units cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.perturbation import perturb_, scale_
from lightning_prune.channels.compaction.plan import Kept, make_plan
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.core.averages import averaged_names
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.tensors import cast_model_

_SCALE = 3.0  # of the weights of trials in double precision


class TrialCopies:
    """Makes copies of a model, all in one precision.

    Args:
        model: Is not changed.
        perturbed: A copy of it with other weights, of which copies are made; :meth:`refine` changes it.
            ``None`` for copies of the model itself, whose weights are 0 already where it is to be cut.
        written: Names of the parameters that passes write to.

    Attributes:
        masked: Whether weights are 0 already where the model is to be cut.
        dtype: The type that parameters and buffers are cast to.
        cast: Whether they are; otherwise they keep the types that the model's code fixes.
        scale: Factor of the weights.
    """

    def __init__(self, model: nn.Module, perturbed: nn.Module | None, written: frozenset[str]) -> None:
        self._model, self._perturbed, self._written = model, perturbed, written
        self._averages = averaged_names(model)
        self._shared: nn.Module | None = None  # whose memory copies share, but for what they change
        self.masked = perturbed is None
        self.dtype, self.cast, self.scale = torch.float32, True, 1.0

    def begin(self, dtype: torch.dtype, *, cast: bool) -> None:
        """Set the precision of the first trials, which are many: their copies share memory.

        Args:
            dtype: The type.
            cast: Whether to cast to it.
        """
        self.dtype, self.cast, self._shared = dtype, cast, None
        shared = self._whole() if self._perturbed is None else copy_sharing_weights(self._perturbed)
        if cast:
            cast_model_(shared, dtype)
        self._shared, self._shared_type = shared, dtype

    def refine(self) -> None:
        """Go on in double precision, of the model's own weights or with larger, other ones.

        It happens that those of the first trials hide something.
        """
        self.dtype, self.cast = torch.float64, True
        if self._shared is None or self.masked:
            self._shared = None
        else:
            perturb_(self._shared, seed=1)
            self.scale = _SCALE

    def whole(self, own: Iterable[str] = ()) -> nn.Module:
        """Return a copy of the model.

        Args:
            own: Names of parameters that the caller changes in place. Others may share their memory with other
                copies: only their ``data`` attribute may be set.
        """
        if self._shared is None:
            return self._whole()
        if self.dtype is self._shared_type and self.scale == 1:
            return copy_sharing_weights(self._shared, {*own, *self._written})
        # those that are cast get memory of their own then
        parameters = self._shared.named_parameters()
        kept = {name for name, each in parameters if each.dtype is self.dtype or not each.is_floating_point()}
        model = copy_sharing_weights(self._shared, kept) if self.cast else copy_model(self._shared)
        if self.cast:
            cast_model_(model, self.dtype)
        scale_(model, self.scale)
        return model

    def cut(self, kept: Kept) -> nn.Module:
        """Return a copy without the units that are not kept."""
        model = self.whole()
        # the plan of the model itself: averages are known by their values, which trials perturb
        replay_(model, make_plan(self._model, kept))
        return model

    @torch.no_grad()
    def with_zeros(self, kept: Kept) -> nn.Module:
        """Return a copy in which the units that are not kept are 0."""
        factors: dict[str, list[Tensor]] = {}
        for group, units in () if self.masked else kept:
            for part in group.masked:
                # in the weight's dtype, since any other would be converted after it is expanded to full size
                weight = self._model.get_parameter(part.name)
                factor = part.spread(units.to(weight.device, self.dtype))
                factors.setdefault(part.name, []).append(factor)
        factors |= {own: factors[name] for own, name in self._averages.items() if name in factors}
        model = self.whole(factors)
        for name, each in factors.items():
            for factor in each:
                model.get_parameter(name).mul_(factor)
        return model

    def _whole(self) -> nn.Module:
        model = copy_model(self._model)
        if self.cast:
            cast_model_(model, self.dtype)
        return model
