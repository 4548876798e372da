"""How far the outputs of a cut network may be from those of the masked one: as far as rounding errors go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.perturbation import FloatTypes, jitter_, reorder_
from lightning_prune.core.probes import relative_difference
from lightning_prune.units.groups import UnitGroup

EXACT = {torch.float64: 1e-13, torch.float32: 1e-6}  # differences up to these are rounding errors
LARGEST = {torch.float64: 1e-9, torch.float32: 1e-3}  # and none is larger than these
_NOISE_FACTOR = 8  # how many times the measured rounding errors a difference may be


def measured_tolerance(
    masked_copy: Callable[[], nn.Module],
    groups: Sequence[UnitGroup],
    outputs: Callable[[nn.Module], Sequence[list[Tensor]]],
    expected: Sequence[list[Tensor]],
    dtype: torch.dtype,
) -> float:
    """Return the largest difference that rounding errors may make.

    Rounding errors are measured: they are the difference between the outputs of the masked network and those of
    the same network with its units in another order. If code of the network casts to a narrower type, that with
    weights that are rounded otherwise counts, too.

    Args:
        masked_copy: Returns a copy of the masked network.
        groups: The unit groups.
        outputs: Returns the outputs of each pass of a network.
        expected: Those of the masked network.
        dtype: The type of its numbers.
    """
    exact = EXACT[dtype]
    try:
        reorder_(model := masked_copy(), groups)
        with FloatTypes() as types:
            noise = largest_difference(expected, outputs(model))
        narrow = types.epsilon > torch.finfo(dtype).eps
        if narrow:  # code that casts to a narrower type seldom rounds otherwise, and then by much
            jitter_(model := masked_copy(), types.epsilon)
            noise = max(noise, largest_difference(expected, outputs(model)))
    except Exception:  # a user's forward may raise anything
        return exact
    largest = LARGEST[torch.float32 if narrow else dtype]
    # where order changes more than rounding does, the network depends on it, and nothing is measured
    return max(exact, _NOISE_FACTOR * noise) if _NOISE_FACTOR * noise < largest else exact


def amplifies_rounding(
    model: nn.Module,
    outputs: Callable[[nn.Module], Sequence[list[Tensor]]],
    expected: Sequence[list[Tensor]],
    dtype: torch.dtype,
) -> bool:
    """Return whether rounding errors of a network's weights become too large in its outputs to compare these.

    Args:
        model: A copy of the network, which is changed.
        outputs: As for :func:`measured_tolerance`.
        expected: The outputs of the network.
        dtype: The type of its numbers.
    """
    jitter_(model, torch.finfo(dtype).eps)
    return _NOISE_FACTOR * largest_difference(expected, outputs(model)) > LARGEST[dtype]


def largest_difference(expected: Iterable[list[Tensor]], found: Iterable[list[Tensor]]) -> float:
    """Return the largest relative difference between the outputs of several passes."""
    return max(relative_difference(one, other) for one, other in zip(expected, found, strict=True))
