"""Copies of a model that trials run: whole, with units masked, or with units cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.perturbation import perturb_, scale_
from lightning_prune.channels.compaction.plan import Kept, make_plan
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.core.averages import averages_within, names_in
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.tensors import cast_model_

_SCALE = 3.0  # of the weights of trials in double precision


class TrialCopies:
    """Makes copies of a model, all in one precision.

    Args:
        model: Is not changed.
        perturbed: A copy of it with other weights, of which copies are made until they are refined. ``None``
            for copies of the model itself, whose weights are 0 already where it is to be cut.
        written: Names of the parameters that passes write to.

    Attributes:
        masked: Whether weights are 0 already where the model is to be cut.
        dtype: The type that parameters and buffers are cast to.
        cast: Whether they are; otherwise they keep the types that the model's code fixes.
        scale: Factor of the weights.
    """

    def __init__(self, model: nn.Module, perturbed: nn.Module | None, written: frozenset[str]) -> None:
        self._model, self._perturbed, self._written = model, perturbed, written
        self._averages = averages_within(model)
        # whose memory copies share, but for what they change; None if each has memory of its own
        self._shared: nn.Module | None = None
        self.masked = perturbed is None
        self.dtype, self.cast, self.scale = torch.float32, True, 1.0

    def begin(self, dtype: torch.dtype, *, cast: bool) -> None:
        """Set the precision of the first trials, which are many: their copies share memory.

        Args:
            dtype: The type.
            cast: Whether to cast to it.
        """
        self.dtype, self.cast, self._shared = dtype, cast, None
        if self._perturbed is None:
            self._shared = self.whole()
        else:
            shared = copy_sharing_weights(self._perturbed)
            if cast:
                cast_model_(shared, dtype)
            self._shared = shared

    def refine(self) -> None:
        """Go on in double precision, of the model's own weights or with larger, other ones.

        It happens that those of the first trials hide something. Each copy is made anew, so that there is no
        other one beside it.
        """
        self.dtype, self.cast = torch.float64, True
        self._shared = self._perturbed = None
        if not self.masked:
            self.scale = _SCALE

    @property
    def cheap(self) -> bool:
        """Whether copies share memory, so that one more takes little."""
        return self._shared is not None

    def whole(self, own: Iterable[str] = ()) -> nn.Module:
        """Return a copy of the model.

        Args:
            own: Names of parameters that the caller changes in place. Others may share their memory with other
                copies: only their ``data`` attribute may be set.
        """
        if self._shared is not None:
            return copy_sharing_weights(self._shared, {*own, *self._written})
        if not self.cast:
            model = copy_model(self._model)
        else:
            # those that are cast get memory of their own then
            parameters = self._model.named_parameters()
            same = {
                name for name, each in parameters if each.dtype is self.dtype or not each.is_floating_point()
            }
            cast_model_(model := copy_sharing_weights(self._model, same), self.dtype)
        if not self.masked:
            perturb_(model, seed=1)
            scale_(model, self.scale)
        return model

    def cut(self, kept: Kept) -> nn.Module:
        """Return a copy without the units that are not kept."""
        return self.cut_(self.whole(), kept)

    def cut_(self, copied: nn.Module, kept: Kept) -> nn.Module:
        """Take the units that are not kept out of a copy, and return it."""
        # the plan of the model itself: averages are known by their values, which trials perturb
        replay_(copied, make_plan(self._model, kept, self._averages))
        return copied

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
        factors |= {own: factors[name] for own, name in names_in(self._averages).items() if name in factors}
        model = self.whole(factors)
        for name, each in factors.items():
            for factor in each:
                model.get_parameter(name).mul_(factor)
        return model
