"""Which parameters training updates: those that require gradients, or those that a fit has said to train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from torchmetrics import Metric

from lightning_prune.core.tensors import own_tensors

_TRAINS: WeakIdKeyDictionary = WeakIdKeyDictionary()


@contextmanager
def training_only(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Tell, in a ``with`` block, which parameters of a model training updates.

    Args:
        model: The model.
        trained: These parameters; others of the model do not train.
    """
    known = {id(each) for each in trained}
    own = list(model.parameters())
    _TRAINS.update((each, id(each) in known) for each in own)
    try:
        yield
    finally:
        for each in own:
            _TRAINS.pop(each, None)


def trains(parameter: Tensor) -> bool:
    """Return whether training updates a parameter; outside a fit, whether it requires gradients."""
    return bool(_TRAINS.get(parameter, parameter.requires_grad))


def metric_tensors(model: nn.Module) -> set[int]:
    """Return the ``id`` of each parameter and buffer that only torchmetrics metrics hold: they do not train."""
    outside: dict[int, nn.Module] = {}
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in outside and not isinstance(module, Metric):
            outside[id(module)] = module
            left += module.children()
    used = {id(tensor) for module in outside.values() for tensor in own_tensors(module)}
    return {id(tensor) for module in model.modules() for tensor in own_tensors(module)} - used
