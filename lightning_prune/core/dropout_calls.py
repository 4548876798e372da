"""Calls of PyTorch's functions for dropout, and of those that contain it."""

from __future__ import annotations

from typing import Any

from torch.nn import functional

_WITH_MODE = frozenset(
    (
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        functional.multi_head_attention_forward,
    )
)
_SHARE = 4  # place of the share to drop among the arguments of attention


def without_chance(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function such that it drops nothing; those of any other function as they are.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    if func in _WITH_MODE:  # torch passes it by name to what overrides a function
        return args, kwargs | {"training": False}
    if func is functional.scaled_dot_product_attention:
        if len(args) > _SHARE:
            return (*args[:_SHARE], 0.0, *args[_SHARE + 1 :]), kwargs
        return args, kwargs | {"dropout_p": 0.0}
    return args, kwargs
