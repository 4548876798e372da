"""Watches a model run and follows the labels of its parameters through every op that it really calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.calls import Call
from lightning_prune.graph.fields import Fields
from lightning_prune.graph.labels import Labels
from lightning_prune.graph.rules import rule_for

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Trace(TorchDispatchMode):
    """Follows labels through one pass of a model, or several.

    Args:
        model: Each dimension of each of its parameters and floating-point buffers gets labels.

    Attributes:
        labels: All labels, coupled and frozen by what ran.
        places: Tensor name to its labels, a line for each dimension.
        terms: Multiply-adds of each op that was counted, the labels along each dimension that they run over,
            and the names of the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = Labels()
        self.places: dict[str, tuple[Tensor, ...]] = {}
        self.terms: list[tuple[int, list[Tensor], frozenset[str]]] = []
        self._counting = False
        self._made: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
        self._seen: set[str] = set()
        self._names: dict[int, str] = {}
        self._fields: Any = WeakTensorKeyDictionary()
        self._weights: Any = WeakTensorKeyDictionary()
        tensors = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_floating_point()  # whole numbers are indices, and go by position
        }
        sizes = [size for tensor in tensors.values() for size in tensor.shape]
        lines = iter(self.labels.new(sum(sizes)).split(sizes))
        for name, tensor in tensors.items():
            self.places[name] = tuple(next(lines) for _ in tensor.shape)
            self._names[id(tensor)] = name
            self._weights[tensor] = frozenset([name])
            self._fields[tensor] = tuple(
                line.view([-1 if dim == each else 1 for each in range(tensor.ndim)])
                for dim, line in enumerate(self.places[name])
                if tensor.shape[dim] > 1
            )
        for prefix, module in model.named_modules():
            if isinstance(module, _RECURRENT):
                why = f"is part of {prefix or 'the model'}, and {type(module).__name__} layers are not cut"
                for leaf, _ in module.named_parameters(prefix):
                    for line in self.places.get(leaf, ()):
                        self._made.append(line)
                        self.labels.freeze(line, why)

    @property
    def made(self) -> Tensor:
        """For each label whether a contraction made it: the outputs of weights, not their inputs."""
        made = torch.zeros(len(self.labels), dtype=torch.bool)
        made[torch.cat(self._made)] = True
        return made

    @property
    def seen(self) -> frozenset[str]:
        """Names of the tensors that took part in what ran."""
        return frozenset(self._seen)

    def follow(self, run: Callable[[], Any], *, count: bool = False) -> None:
        """Watches a pass, without gradients, with attention in its plain form; what it gives is frozen.

        Args:
            run: The pass.
            count: Whether its multiply-adds are counted.
        """
        self._counting = count
        with torch.no_grad(), _plain_attention(), self:
            result = run()
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                for field in self._look_up(leaf):
                    self.labels.freeze(field, "is the network's output")

    def _look_up(self, tensor: Tensor) -> Fields:
        found: Fields = self._fields.get(tensor, ())
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op, then its rule."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        call = Call(
            self.labels,
            func,
            args,
            kwargs,
            [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)],
            self._look_up,
            lambda field: self._made.append(field.flatten()),
            lambda macs, lines: self._count(macs, lines, leaves),
            all(tensor in self._weights for tensor in leaves),
        )
        if call.weights:
            names = frozenset[str]().union(*(self._weights[tensor] for tensor in leaves))
            self._weights.update((output, names) for output in call.outputs)
        for tensor in call.tensors:
            self._seen.add(self._names.get(id(tensor), ""))
        if any(self._look_up(tensor) for tensor in call.tensors):
            for output, fields in zip(call.outputs, rule_for(func)(call), strict=True):
                if func._schema.is_mutable and _is_part(output):
                    self._check_unchanged(output, fields)
                self._fields[output] = fields
        return result

    def _count(self, macs: int, lines: Sequence[Tensor], tensors: list[Tensor]) -> None:
        if self._counting:
            matrices = [tensor for tensor in tensors if tensor.ndim > 1]
            names = (self._weights.get(tensor, frozenset[str]()) for tensor in matrices)
            self.terms.append((macs, [line.flatten() for line in lines], frozenset().union(*names)))

    def _check_unchanged(self, part: Tensor, fields: Fields) -> None:
        """Labels follow the object: those that the whole does not have are frozen."""
        before = self._look_up(part)
        same = len(before) == len(fields) and all(
            old.shape == new.shape and torch.equal(self.labels.find(old), self.labels.find(new))
            for old, new in zip(before, fields, strict=True)
        )
        for field in () if same else (*before, *fields):
            self.labels.freeze(field, "is written into a part of another tensor")


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
