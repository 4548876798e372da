"""Counts the multiply-adds of a pass by the parameter that takes part in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.channels.graph.calls import schema_of, tensors_of, written_tensors
from lightning_prune.channels.graph.products import products
from lightning_prune.channels.graph.recorder import memory_of
from lightning_prune.core.probes import OpMode, as_probe, math_attention, pass_mode


def macs_by_parameter(model: nn.Module, example: Any) -> dict[str, int]:
    """Return the multiply-adds of one pass by the parameter whose elements they multiply.

    They are half of what ``torch.utils.flop_counter`` counts, and those of fused recurrent layers. A parameter
    counts the products of itself, and of tensors that are computed from it and from no other parameter. A tied
    parameter counts all its uses.

    Args:
        model: The model. It runs once, without gradients and with unfused attention, in evaluation mode if
            ``example`` is no probe in training mode.
        example: A tensor, a tuple of ``forward``'s arguments, a mapping of keyword arguments, or a probe. The
            result is for the whole batch that it holds.

    Returns:
        First name of each parameter to its multiply-adds, if it has any. The key "" is for products of no
        parameter, such as those of attention scores, and of several. All together are the model's.

    >>> macs_by_parameter(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(1, 4))
    {'': 0, '0.weight': 12}
    """
    probe = as_probe(example)
    with pass_mode(model, training=probe.training), math_attention(), _MacCounter(model) as counter:
        probe(model)
    return dict(counter.macs)


class _MacCounter(OpMode):
    """Dispatch mode that counts the multiply-adds of one pass.

    Args:
        model: The model that runs.

    Attributes:
        macs: Name of each parameter to its multiply-adds; "" for those of no parameter, and of several.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: dict[str, int] = {"": 0}
        # tensors that do not depend on the inputs of the pass, to the parameters that they are computed from
        self._sources: Any = WeakTensorKeyDictionary()
        self._sources.update((tensor, frozenset[str]()) for tensor in model.buffers())
        self._sources.update((tensor, frozenset([name])) for name, tensor in model.named_parameters())
        self._overwritten: set[StorageWeakRef] = set()  # with values that depend on the inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, the branch that is taken if it is a condition, and count its products."""
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            condition, *branches, operands = args
            with self:
                return branches[0 if condition else 1](*operands)
        result = func(*args, **kwargs)
        for product in products(func, args, kwargs, result):
            names = frozenset[str]().union(*map(self._parameters_of, product.factors))
            name = next(iter(names)) if len(names) == 1 else ""
            self.macs[name] = self.macs.get(name, 0) + product.macs
        self._follow(func, args, kwargs, tensors_of([result]))
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        """Note what the outputs of an op are computed from."""
        given = tensors_of((*args, *kwargs.values()))
        if all(map(self._is_constant, given)):
            names = frozenset[str]().union(*map(self._parameters_of, given))
            self._sources.update((output, names) for output in outputs)
        elif schema_of(func).is_mutable:
            self._overwritten |= memory_of(written_tensors(func, args, kwargs))

    def _is_constant(self, tensor: Tensor) -> bool:
        """Return whether a tensor does not depend on the inputs of the pass."""
        return tensor in self._sources and self._overwritten.isdisjoint(memory_of([tensor]))

    def _parameters_of(self, tensor: Tensor) -> frozenset[str]:
        """Return the parameters that a tensor is computed from, if it is from these and buffers alone."""
        names: frozenset[str] = self._sources[tensor] if self._is_constant(tensor) else frozenset()
        return names
