"""The products of each op: how many multiply-adds it takes, and which tensors they multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lightning_prune.channels.graph.calls import argument_of, schema_of, tensors_of
from lightning_prune.core.recurrent_calls import LAYERS

_ATEN = torch.ops.aten
# position of the first of two arguments that an op multiplies
_FACTORS: Mapping[Any, int] = {
    **dict.fromkeys((_ATEN.mm, _ATEN.bmm, _ATEN._scaled_mm), 0),
    **dict.fromkeys((_ATEN.addmm, _ATEN.baddbmm), 1),
    **dict.fromkeys((_ATEN.convolution, _ATEN._convolution, _ATEN.convolution_overrideable), 0),
    **dict.fromkeys((_ATEN.cudnn_convolution, _ATEN._slow_conv2d_forward), 0),
}
# arguments that hold the matrices of recurrent layers and cells, which torch does not count
_RECURRENT: Mapping[Any, Sequence[str]] = {
    **{getattr(_ATEN, name): ("params",) for name in LAYERS},
    **{getattr(_ATEN, f"{name}_cell"): ("w_ih", "w_hh") for name in LAYERS},
    _ATEN.mkldnn_rnn_layer: ("weight0", "weight1"),
    _ATEN._cudnn_rnn: ("weight",),
    _ATEN.miopen_rnn: ("weight",),
    _ATEN._lstm_mps: ("params",),
}


class Product(NamedTuple):
    """Multiply-adds that an op takes.

    Attributes:
        macs: Their number.
        factors: The tensors that they multiply, as far as known.
    """

    macs: int
    factors: Sequence[Tensor]


def products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[Product]:
    """Return the products of an op: half of the FLOPs that torch counts, and those of recurrent layers.

    Args:
        func: The op.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.

    Returns:
        One product for most ops, one for each matrix of a recurrent layer, none for ops that are not counted.
        Those of ops that multiply more than two tensors, such as fused attention, have no factors.
    """
    packet = getattr(func, "_overloadpacket", func)
    if packet in _RECURRENT:
        return _recurrent(func, args, kwargs, _RECURRENT[packet])
    if (flops := flop_registry.get(packet)) is None:
        return []
    names: list[str] = []
    if packet in _FACTORS:
        names = [argument.name for argument in schema_of(func).arguments[_FACTORS[packet] :][:2]]
    factors = tensors_of([argument_of(func, args, kwargs, name) for name in names])
    return [Product(flops(*args, **kwargs, out_val=result) // 2, factors)]


def _recurrent(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]) -> list[Product]:
    """Return one product for each matrix, which multiplies a vector at each position of each sequence."""
    sequences = args[0]  # packed ones have one row a position
    positions = sequences[..., 0].numel()
    weights = tensors_of([argument_of(func, args, kwargs, name) for name in names])
    return [Product(each.numel() * positions, [each]) for each in weights if each.ndim == 2]
