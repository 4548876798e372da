"""The calls of modules in one pass of a model: how long each takes by itself, and its tensors' sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.core.clock import compute_time

Key: TypeAlias = tuple[str, int]  # name of a module, and the number of its call in the pass


class ModuleCalls:
    """Follows the calls of all modules of a model in one pass; TorchScript is followed as a whole.

    Attributes:
        caller: The call that each call was made in; ``None`` for those outside of all.
    """

    def __init__(self) -> None:
        self.caller: dict[Key, Key | None] = {}
        self._open: list[Key] = []

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follow the calls in a ``with`` block."""
        counts: dict[str, int] = {}
        handles = []

        def enter(name: str, *given: Any) -> None:
            key = (name, counts.get(name, 0))
            counts[name] = key[1] + 1
            self.caller[key] = self._open[-1] if self._open else None
            self._open.append(key)
            self.entered(key)

        def leave(module: nn.Module, *passed: Any) -> None:  # arguments, keyword arguments and the result
            self.left(self._open.pop(), module, passed)

        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entered(self, key: Key) -> None:
        """Note that a call begins."""

    def left(self, key: Key, module: nn.Module, passed: tuple[Any, ...]) -> None:
        """Note that a call ends.

        Args:
            key: The call.
            module: The module.
            passed: The arguments of the call, keyword arguments, and the result.
        """


class CallSizes(ModuleCalls):
    """Follows the sizes of tensors.

    Attributes:
        passed: The sizes of what each call is given and returns.
        sizes: Those and the sizes of the module's own parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed: dict[Key, dict[str, int]] = {}
        self.sizes: dict[Key, dict[str, int]] = {}

    def left(self, key: Key, module: nn.Module, passed: tuple[Any, ...]) -> None:
        """Note the sizes."""
        tensors = (leaf for leaf in tree_leaves(passed) if torch.is_tensor(leaf))
        self.passed[key] = sizes_of({str(number): tensor for number, tensor in enumerate(tensors)})
        self.sizes[key] = self.passed[key] | sizes_of(dict(module.named_parameters(recurse=False)))


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the size of each dimension: name of the tensor and number of the dimension, as "weight.0"."""
    return {f"{name}.{dim}": size for name, tensor in tensors.items() for dim, size in enumerate(tensor.shape)}


class CallTimes(ModuleCalls):
    """Follows how long modules take by themselves, without the modules that they call.

    Attributes:
        seconds: The seconds of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[Key, float] = {}
        self._begun: list[float] = []

    def entered(self, key: Key) -> None:
        """Note the time."""
        self.seconds[key] = 0.0
        self._begun.append(compute_time())

    def left(self, key: Key, module: nn.Module, passed: tuple[Any, ...]) -> None:
        """Count the time since the call began for it, and not for its caller."""
        taken = compute_time() - self._begun.pop()
        self.seconds[key] += taken
        caller = self.caller[key]
        if caller is not None:
            self.seconds[caller] -= taken
