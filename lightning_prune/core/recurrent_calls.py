"""Calls of PyTorch's recurrent layers and cells, and of padding, which a dispatch mode sees whole."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_FUNCTIONS = frozenset(
    (
        *(getattr(torch, f"{name}{kind}") for name in LAYERS for kind in ("", "_cell")),
        torch._pad_packed_sequence,
    )
)
# fused kernels that run a whole layer, too, where gradients are wanted
_OPS = (
    *(getattr(torch.ops.aten, name) for name in LAYERS),
    torch.ops.aten._cudnn_rnn,
    torch.ops.aten.miopen_rnn,
)
# the place of the share that is dropped between layers, among the arguments of an op
_DROPOUT = {
    overload: place
    for packet in _OPS
    for overload in (getattr(packet, name) for name in packet.overloads())
    for place, argument in enumerate(overload._schema.arguments)
    if argument.name == "dropout"
}


class WholeRecurrentCalls(TorchFunctionMode):
    """Lets dispatch modes see a recurrent layer or cell, or the padding of what it gives, as one op.

    Otherwise they see what it is made of, which depends on the device and the type: one fused kernel a layer,
    or dozens of ops a time step. Calls that record gradients stay as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; one that is to be seen whole below autograd, which would take it apart."""
        if func not in _FUNCTIONS or torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with torch._C._AutoDispatchBelowAutograd():
            return func(*args, **(kwargs or {}))


def without_dropout(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an op; those of a recurrent layer without dropout between its layers."""
    place = _DROPOUT.get(func)
    return args if place is None else (*args[:place], 0.0, *args[place + 1 :])
