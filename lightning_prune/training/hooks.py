"""Everything that hooks into a module or an optimizer, and takes its hooks away again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_prune.units.masks import MaskStore


class OptimizerHooks:
    """Enforces masks after each step of each optimizer, and tells the first look at a step's gradients.

    An optimizer with a closure, such as LBFGS, evaluates the loss several times in one step: the
    observation is the first, whose gradients belong to the weights from which the step starts.

    Args:
        store: The masks.
    """

    def __init__(self, store: MaskStore) -> None:
        self._store = store
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        self._seen: dict[Optimizer, bool] = {}

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Hooks into optimizers that are not watched yet."""
        for optimizer in optimizers:
            if optimizer not in self._handles:
                self._handles[optimizer] = [
                    optimizer.register_step_pre_hook(self._before),
                    optimizer.register_step_post_hook(self._after),
                ]

    def first_call(self, optimizer: Optimizer) -> bool:
        """Whether gradients are seen for the first time in this step."""
        first = not self._seen.get(optimizer, False)
        if optimizer in self._seen:
            self._seen[optimizer] = True
        return first

    def release(self) -> None:
        """Takes all hooks away."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._seen[optimizer] = False

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._seen.pop(optimizer, None)
        self._store.apply_(parameters_in(optimizer))


class GradientCopies:
    """Gradients as backward left them, for loops in which a user may clip them before the step.

    Args:
        together: Disjoint names of parameters that are observed together, when the first of their optimizers
            steps.
    """

    def __init__(self, together: Iterable[Set[str]]) -> None:
        self._together = list(together)
        self._copies: dict[str, Tensor] = {}

    def hold(self, grads: Mapping[str, Tensor]) -> None:
        """Copies gradients; a later copy, with more accumulated, takes the place of an earlier one."""
        for name, grad in grads.items():
            if name in self._copies:
                self._copies[name].copy_(grad)
            else:
                self._copies[name] = grad.clone()

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Hands over the copies of these parameters, and of what belongs to them, as far as there are any."""
        stepping = set(names)
        taken = [name for group in self._together if group & stepping for name in group & self._copies.keys()]
        return {name: self._copies.pop(name) for name in taken}

    def release(self) -> None:
        """Forgets all copies."""
        self._copies.clear()


class ExampleCapture:
    """Keeps the first example of the first batch that a module's ``forward`` is given.

    Attributes:
        example: ``forward``'s positional arguments for one example, or all by name where it is given any by
            name; ``None`` until it ran.
    """

    def __init__(self, module: nn.Module) -> None:
        self.example: tuple[Any, ...] | dict[str, Any] | None = None
        self._forward: Callable[..., Any] | None = module.forward
        self._handle = module.register_forward_pre_hook(self._capture, with_kwargs=True)

    def release(self) -> None:
        """Takes the hook away, and lets go of the module."""
        self._handle.remove()
        self._forward = None

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.forward != self._forward:
            return  # DDP sends a whole step through it: the call that matters comes within
        given = dict(zip(signature(module.forward).parameters, args, strict=False)) | kwargs if kwargs else args
        self.example = tree_map(_first, given)
        self.release()


def unscaled_gradients(store: MaskStore, parameters: Iterable[Tensor], scale: float) -> dict[str, Tensor]:
    """Name to gradient of the prunable ones among ``parameters``, divided by the loss scale."""
    found = store.named(parameters).items()
    grads = {name: parameter.grad for name, parameter in found if parameter.grad is not None}
    return grads if scale == 1 else {name: grad / scale for name, grad in grads.items()}


def parameters_in(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that an optimizer steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _first(value: Any) -> Any:
    if torch.is_tensor(value) and value.ndim:
        return value[:1].detach().clone()
    return value
