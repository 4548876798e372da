"""What averaging callbacks do: the averages that they keep, and the epoch that SWA adds to a fit."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages_of(trainer: Trainer, model: nn.Module) -> list[nn.Module]:
    """Averages of a network: what callbacks hold as torch's ``AveragedModel``, or as Lightning's SWA holds it.

    Where masked weights are 0 in the network and in its average, they stay 0 in the average. Any other copy of
    the network, such as a teacher, is none.

    Args:
        trainer: Whose callbacks are looked at.
        model: The network; what has other names or shapes averages something else.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    held = [value for callback in callbacks for value in vars(callback).values()]
    averages = [value.module for value in held if isinstance(value, AveragedModel)]
    averages += [each._average_model for each in _swa(trainer) if each._average_model is not None]
    shapes = _shapes(model)
    return [each for each in averages if _shapes(each) == shapes]


def training_epochs(trainer: Trainer) -> int | None:
    """How many epochs train, ``None`` if there is no end: SWA adds one in which batch norms see its average."""
    if trainer.max_epochs in (None, -1):
        return None
    return min([trainer.max_epochs, *(each.swa_end + 1 for each in _swa(trainer))])


def _swa(trainer: Trainer) -> list[StochasticWeightAveraging]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, StochasticWeightAveraging)]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
