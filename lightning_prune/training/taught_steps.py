"""Training steps with a teacher: hooks that add the gradient of a distillation term to outputs of a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.core.model_copies import is_compiled
from lightning_prune.training.distillation_terms import DistillationTerm, compared_tensor
from lightning_prune.training.lightning_packages import LightningModule, Trainer
from lightning_prune.training.trainer_queries import loss_scale

_STEP = "training_step"


class TaughtSteps:
    """Runs a teacher beside a module in the training steps of one fit, until it is released.

    The teacher sees what the module is called with. The gradient of the term is added where the backward pass
    of the step comes to the module's output, so that there is no other loss and no other backward pass.

    Args:
        trainer: The Trainer.
        owner: The LightningModule that it trains.
        name: Name of the module in ``owner`` whose outputs are compared; empty for ``owner`` itself.
        teacher: Called with the arguments of the module, in evaluation mode and without gradients; changed in
            place.
        term: The term.

    Attributes:
        name: As above.
        value: Sum of the terms in the present batch, without their weight; ``None`` if there is none.
        added: Number of outputs in the present batch to whose gradient a term was added.
    """

    def __init__(
        self, trainer: Trainer, owner: LightningModule, name: str, teacher: nn.Module, term: DistillationTerm
    ) -> None:
        self.name = name
        self.value: Tensor | None = None
        self.added = 0
        self._trainer, self._owner, self._term = trainer, owner, term
        self._teacher = teacher.eval().requires_grad_(False)
        self._place = f"module={name!r}" if name else f"forward of {type(owner).__name__}"
        self._in_step = False
        self._outputs: list[Any] = []  # of the teacher, for calls of the module that have not returned yet
        self._calls = 0
        module = owner.get_submodule(name)
        if any(_compiled_around(module, each) for each in owner.modules()):
            torch.compiler.reset()  # code that was compiled without the hooks would not run them
        self._hooks = _Hook(self._before), _Hook(self._after)
        self._handles = [
            module.register_forward_pre_hook(self._hooks[0], prepend=True, with_kwargs=True),
            module.register_forward_hook(self._hooks[1]),
        ]
        self._replaced = vars(owner).get(_STEP)
        self._step = _Step(getattr(owner, _STEP), self._run_step)
        vars(owner)[_STEP] = self._step

    def begin_batch(self) -> None:
        """Forget the outputs of the last batch."""
        self.value, self.added, self._calls = None, 0, 0

    def release(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        for hook in self._hooks:
            hook.disable()  # compiled code may go on holding it
        if vars(self._owner).get(_STEP) is self._step:
            if self._replaced is None:
                del vars(self._owner)[_STEP]
            else:
                vars(self._owner)[_STEP] = self._replaced

    def _run_step(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._outputs.clear()
        self._in_step = True
        try:
            result = step(*args, **kwargs)
        finally:
            self._in_step = False
        if not self._calls and (result is not None or not self._owner.automatic_optimization):
            raise ValueError(
                f"{self._place} is not called in training_step, so that nothing meets the loss: give the"
                " module=... that is. A hook does not see module.forward(...): call module(...)."
            )
        return result

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._in_step or not torch.is_grad_enabled():
            return
        if any(isinstance(each, Tensor) and each.grad_fn is not None for each in tree_leaves((args, kwargs))):
            raise ValueError(
                f"{self._place} is called with what other trained modules have returned, and the teacher would"
                " get it, too, instead of what the dense modules return: give a module=... that is called with"
                " the batch, such as a forward that calls all of them."
            )
        with torch.no_grad():
            # the module may change its input in place
            given, named = tree_map_only(Tensor, torch.clone, (args, kwargs))
            self._outputs.append(self._teacher(*given, **named))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._in_step or not self._outputs:
            return
        taught = self._outputs.pop()
        self._calls += 1
        student = compared_tensor(output, self._place)
        if not student.requires_grad:
            return
        value, gradient = self._term.value_and_gradient(
            student, compared_tensor(taught, f"the teacher of {self._place}")
        )
        self.value = value if self.value is None else self.value + value
        student.register_hook(self._adder(gradient))

    def _adder(self, gradient: Tensor) -> Callable[[Tensor], Tensor | None]:
        """Return a tensor hook that adds a gradient, in the first backward pass of the loss."""
        left = [gradient]

        def add(grad: Tensor) -> Tensor | None:
            # within an automatic step a backward pass is another one, such as that of a gradient penalty
            if not left or (self._in_step and self._owner.automatic_optimization):
                return None
            self.added += 1
            return (grad + self._factor * left.pop()).to(grad.dtype)

        return add

    @property
    def _factor(self) -> float:
        """The factor by which Lightning multiplies the loss before the backward pass."""
        scale = loss_scale(self._trainer)
        automatic = self._owner.automatic_optimization
        return scale / self._trainer.accumulate_grad_batches if automatic else scale

    def unreached(self) -> str | None:
        """Return a warning if the module was called in the present batch and no output had a gradient."""
        if not self._calls or self.added:
            return None
        return (
            f"Distillation has added nothing in a batch: no loss depends on the output of {self._place} through"
            " what requires gradients. Give the module=... whose output meets the loss."
        )


class _Hook:
    """A forward hook that does nothing in a copy of its module."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self._run = run

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        if self._run is not None:
            self._run(*args)

    def disable(self) -> None:
        """Do nothing from now on."""
        self._run = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _Step:
    """A ``training_step`` within another function; in a copy of the module, that of the copy alone."""

    def __init__(self, own: Callable[..., Any], run: Callable[[Callable[..., Any], Any, Any], Any]) -> None:
        update_wrapper(self, own)
        # Lightning reads the signature of what is wrapped, one level down
        self.__wrapped__ = getattr(own, "__wrapped__", own)
        self._own, self._run = own, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._own, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._own,)


def _compiled_around(module: nn.Module, other: nn.Module) -> bool:
    """Return whether a module is a part of another one that is compiled as a whole."""
    compiled = is_compiled(other) or isinstance(other, OptimizedModule)
    return compiled and module is not other and any(each is module for each in other.modules())


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step
