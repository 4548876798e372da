"""Calls of attention whose scale follows from the number of channels, which ops below do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Told: TypeAlias = Callable[[Tensor, Tensor], None]


class UnscaledAttention(TorchFunctionMode):
    """Tells of each call of ``scaled_dot_product_attention`` that is given no scale.

    Args:
        told: Is given the queries and the keys.
    """

    def __init__(self, told: _Told) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            self._told(given["query"], given["key"])
        return func(*args, **kwargs)
