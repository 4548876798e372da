"""Layer norms and RMS norms from which channels were cut: their statistics are those of all the channels."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.norm_forms import at_least_single, layer_norm, rms_norm
from lightning_prune.channels.compaction.own_norms import own_norm


class NarrowLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` after some of the channels that it normalises over were cut.

    A channel that went was 0, and counted in the mean and in the variance. ``normalized_shape`` stays the
    number of channels that count; ``weight`` has those that are left. The result has the type of the weight.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the parent class
        """Normalise by the mean and the variance of all channels, of which those that went are 0."""
        if input.is_nested:  # nn.TransformerEncoder makes it of a batch with padding
            return torch.nested.as_nested_tensor([self.forward(each) for each in input.unbind()])
        wide = at_least_single(input)
        result = layer_norm(wide, self.normalized_shape[0], self.eps, self.weight, self.bias)
        return result.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return how many channels are left, and of how many."""
        return f"{len(self.weight)} of {super().extra_repr()}"


class NarrowRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` after some of the channels that it normalises over were cut; as ``NarrowLayerNorm``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the mean square of all channels, of which those that went are 0."""
        wide = at_least_single(x)
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        return rms_norm(wide, self.normalized_shape[0], eps, self.weight).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return how many channels are left, and of how many."""
        return f"{len(self.weight)} of {super().extra_repr()}"


_NARROW: dict[type[nn.Module], Any] = {nn.LayerNorm: NarrowLayerNorm, nn.RMSNorm: NarrowRMSNorm}
_WHOLE: dict[Any, Any] = {narrow: whole for whole, narrow in _NARROW.items()}


def set_norm_class_(module: nn.Module) -> None:
    """Set the class of a norm by the width of its weight; ignore any other module."""
    if _can_be_narrow(module):
        whole = _WHOLE.get(type(module), type(module))
        module.__class__ = whole if module.weight.shape == module.normalized_shape else _NARROW[whole]


def open_norms_(model: nn.Module) -> nn.Module:
    """Let norms compute by ops through which channels can be followed, and return the model.

    A norm without a weight stays as it is: what it makes of 0 is not 0, and nothing masks that.
    """
    for module in model.modules():
        if _can_be_narrow(module):
            module.__class__ = _NARROW.get(type(module), type(module))
        elif (norm := own_norm(module)) is not None:
            norm.open_(module)
    return model


def _can_be_narrow(module: nn.Module) -> TypeGuard[nn.LayerNorm | nn.RMSNorm]:
    """Return whether a module is a norm over one dimension with a weight, which says how wide it is."""
    known = type(module) in _NARROW or type(module) in _WHOLE
    return known and module.weight is not None and len(cast("nn.LayerNorm", module).normalized_shape) == 1
