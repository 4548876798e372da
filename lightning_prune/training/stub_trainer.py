"""Stubs for the Trainer, optimizers and loggers of a LightningModule, so that a copy runs outside the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_prune.training.lightning_packages import Trainer, is_lightning_module


class Position(NamedTuple):
    """A position in a fit.

    Attributes:
        epoch: The Trainer's ``current_epoch``.
        step: The Trainer's ``global_step``.
    """

    epoch: int
    step: int


class _NullObject:
    """An object whose attributes, calls and items do nothing, such as a scheduler or a logger."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NullObject()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _NullObject()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __getitem__(self, key: Any) -> Any:
        return _NullObject()


class _OptimizerStub(_NullObject):
    """An optimizer that changes nothing; its hyperparameters can be read, and ``step`` calls its closure."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()


class _TrainerStub:
    """Reads all attributes from a Trainer, except for its position and its loggers, which do nothing."""

    def __init__(self, trainer: Trainer, position: Position) -> None:
        self._trainer = trainer
        self.current_epoch, self.global_step = position
        self.logger = _NullObject()
        self.loggers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def use_stubs_(
    copy: nn.Module,
    trainer: Trainer,
    position: Position,
    on_backward: Callable[[Any], object] = lambda loss: None,
    on_log: Callable[[Any], object] = lambda value: None,
) -> None:
    """Replace Trainer, optimizers, schedulers and logging of a copied module by stubs that change nothing.

    Args:
        copy: A copy of the module, changed in place.
        trainer: The module's Trainer, which does not change.
        position: The position that the stub has.
        on_backward: Called with each loss that is given to ``manual_backward``.
        on_log: Called with each value, or mapping of values, that is logged.
    """
    assert copy is not trainer.lightning_module
    optimizers = [_OptimizerStub(optimizer) for optimizer in trainer.optimizers]
    first = optimizers[0] if optimizers else _NullObject()  # outside of a fit there are none yet
    for module in copy.modules():
        if is_lightning_module(module):
            vars(module).update(
                _trainer=_TrainerStub(trainer, position),
                log=lambda name, value, *_, **__: on_log(value),
                log_dict=lambda dictionary, *_, **__: on_log(dictionary),
                manual_backward=lambda loss, *_, **__: on_backward(loss),
                optimizers=lambda *_, **__: optimizers if len(optimizers) > 1 else first,
                lr_schedulers=_NullObject(),
                toggle_optimizer=_NullObject(),
                untoggle_optimizer=_NullObject(),
                toggled_optimizer=_NullObject(),
                clip_gradients=_NullObject(),
            )
