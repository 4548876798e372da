"""Hooks on optimizers and modules during a fit: enforce masks, copy gradients, capture an example input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.core.tensors import map_tensors
from lightning_prune.units.masks import MaskStore


class OptimizerHooks:
    """Step hooks on optimizers, which enforce the masks after each step.

    An optimizer with a closure, such as LBFGS, evaluates the loss several times in one step. Only the first
    evaluation counts as an observation: its gradients are those of the weights before the step.

    Args:
        store: The masks.
    """

    def __init__(self, store: MaskStore) -> None:
        self._store = store
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        self._observed: dict[Optimizer, bool] = {}  # optimizers within a step: whether it was observed

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Add the hooks to the optimizers that do not have them yet."""
        for optimizer in optimizers:
            if optimizer not in self._handles:
                self._handles[optimizer] = [
                    optimizer.register_step_pre_hook(self._before),
                    optimizer.register_step_post_hook(self._after),
                ]

    def first_call(self, optimizer: Optimizer) -> bool:
        """Return whether this is the first time that it is called for this step of the optimizer."""
        first = not self._observed.get(optimizer, False)
        if optimizer in self._observed:
            self._observed[optimizer] = True
        return first

    def release(self) -> None:
        """Remove all hooks."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        self._observed.clear()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._observed[optimizer] = False

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._observed.pop(optimizer, None)
        self._store.apply_(parameters_in(optimizer))


class GradientCopies:
    """Copies of gradients right after the backward pass: under manual optimization a user may clip them later.

    Args:
        sets: Disjoint sets of parameter names. The parameters of a set are observed together, at the first
            step of one of their optimizers.
    """

    def __init__(self, sets: Iterable[Set[str]]) -> None:
        self._sets = list(sets)
        self._copies: dict[str, Tensor] = {}

    def store(self, grads: Mapping[str, Tensor]) -> None:
        """Copy gradients by parameter name; a copy replaces an earlier one, with less accumulated in it."""
        for name, grad in grads.items():
            if name in self._copies:
                self._copies[name].copy_(grad)
            else:
                self._copies[name] = grad.clone()

    def pop(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return and drop the copies there are of these parameters and of the others in their sets."""
        stepping = set(names)
        taken = [name for group in self._sets if group & stepping for name in group & self._copies.keys()]
        return {name: self._copies.pop(name) for name in taken}

    def release(self) -> None:
        """Drop all copies."""
        self._copies.clear()


class ForwardCapture:
    """Keeps what ``forward`` of a module is called with the first time.

    The module has a ``forward`` of its own until then. A forward hook would not see ``self.forward(x)``.

    Args:
        module: The module.
        take: Returns what is kept of a tensor.

    Attributes:
        arguments: The positional and the keyword arguments; ``None`` before the first forward pass.
        batch_size: Length of their first tensor that is not a scalar; 1 if there is none.
    """

    def __init__(self, module: nn.Module, take: Callable[[Tensor], Tensor]) -> None:
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.batch_size = 1
        self._take = take
        self._names: Iterable[str] = ()
        self._module: nn.Module | None = module
        self._forward: Callable[..., Any] | None = module.forward
        self._own = vars(module).get("forward")
        vars(module)["forward"] = self._capture

    @property
    def example(self) -> tuple[Any, ...] | dict[str, Any] | None:
        """The positional arguments, or all arguments by name if any was given by name; ``None`` as above."""
        if self.arguments is None:
            return None
        args, kwargs = self.arguments
        return dict(zip(self._names, args, strict=False)) | kwargs if kwargs else args

    def release(self) -> None:
        """Give the module its ``forward`` back, and drop the reference to it."""
        if self._module is not None and vars(self._module).get("forward") == self._capture:
            if self._own is None:
                del vars(self._module)["forward"]
            else:
                vars(self._module)["forward"] = self._own
        self._module = self._forward = None

    def _capture(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._forward
        assert forward is not None
        if self._module is not None:
            sizes: list[int] = []

            def take(tensor: Tensor) -> Tensor:
                sizes.extend(tensor.shape[:1])
                return self._take(tensor)

            self.arguments = map_tensors((args, kwargs), take)
            self.batch_size = next(iter(sizes), 1)
            self._names = tuple(signature(forward).parameters) if kwargs else ()
            self.release()
        return forward(*args, **kwargs)


def first_of(tensor: Tensor) -> Tensor:
    """Return a copy of the first example of a batch."""
    return (tensor[:1] if tensor.ndim else tensor).detach().clone()


def unscaled_gradients(store: MaskStore, parameters: Iterable[Tensor], scale: float) -> dict[str, Tensor]:
    """Return name to gradient, divided by the loss scale, of the parameters that have a mask and a gradient."""
    found = store.named(parameters).items()
    grads = {name: parameter.grad for name, parameter in found if parameter.grad is not None}
    return grads if scale == 1 else {name: grad / scale for name, grad in grads.items()}


def parameters_in(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
