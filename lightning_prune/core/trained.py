"""Which parameters training updates: those that require gradients, or those that a fit has said to train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from torchmetrics import Metric

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
    """Return the ``id`` of each parameter and buffer in a torchmetrics metric, which does not train."""
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    return {id(tensor) for metric in metrics for tensor in (*metric.parameters(), *metric.buffers())}
