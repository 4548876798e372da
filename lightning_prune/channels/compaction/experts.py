"""Experts that were cut: modules without weights, which give zeros, and stacks with new numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def zeros_like_first(*args: Any, **kwargs: Any) -> Tensor:
    """Return zeros of the shape of the first tensor that is given, in the type that a product would have."""
    given: Tensor = next(each for each in (*args, *kwargs.values()) if torch.is_tensor(each))
    device = given.device.type
    cast = given.is_floating_point() and given.dtype is not torch.float64 and torch.is_autocast_enabled(device)
    return torch.zeros_like(given, dtype=torch.get_autocast_dtype(device) if cast else given.dtype)


def is_removed(module: nn.Module) -> bool:
    """Return whether a module is an expert that was cut."""
    return vars(module).get("forward") is zeros_like_first


def set_removed_(module: nn.Module, removed: bool) -> None:
    """Let a module give zeros, whatever it is given, or take that back."""
    if removed:
        vars(module)["forward"] = zeros_like_first
    else:
        del vars(module)["forward"]


def integers_in(args: Any) -> list[Tensor]:
    """Return the tensors of whole numbers among arguments."""
    return [each for each in tree_leaves(args) if _holds_integers(each)]


@dataclass(frozen=True)
class Renumber:
    """Forward pre-hook of a stack of experts from which some were cut.

    What is sent to an expert that was cut goes to the number one above the last, which is that of no expert.
    Where the stack takes no such number, it goes to the first one that is left, with a share of 0.

    Args:
        size: Number of experts before the cut.
        kept: Their numbers that are left, in ascending order.
        shares: Whether the stack takes no number above the last; its shares are then the tensors of the shape
            of the numbers.
    """

    size: int
    kept: tuple[int, ...]
    shares: bool

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with the new numbers, and shares, in place of those that are given."""
        (given,) = integers_in((args, kwargs))
        numbers = torch.full((self.size + 1,), 0 if self.shares else len(self.kept))
        numbers[list(self.kept)] = torch.arange(len(self.kept))
        left = torch.zeros(self.size + 1, dtype=torch.bool)
        left[list(self.kept)] = True
        places = given.long()

        def changed(value: Any) -> Any:
            if value is given:
                return numbers.to(value.device, value.dtype)[places]
            if self.shares and torch.is_tensor(value) and value.shape == given.shape:
                return value * left.to(value.device)[places]
            return value

        return tree_map(changed, (args, kwargs))


def renumber_(module: nn.Module, size: int, kept: Sequence[int], shares: bool) -> None:
    """Let a stack of experts understand the numbers from before a cut; for arguments see ``Renumber``."""
    module.register_forward_pre_hook(Renumber(size, tuple(kept), shares), with_kwargs=True)


def undo_renumbering_(module: nn.Module) -> None:
    """Take the last renumbering back."""
    last = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Renumber)][-1]
    del module._forward_pre_hooks[last]
    module._forward_pre_hooks_with_kwargs.pop(last, None)


def _holds_integers(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype in (torch.int64, torch.int32, torch.int16)
