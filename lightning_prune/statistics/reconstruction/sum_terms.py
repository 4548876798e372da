"""What is added to the outputs of layers, as in residual blocks, and how much it has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_LEAST_GAIN = 1e-2  # of the largest one of a batch norm; smaller ones would ask for huge weights


class ResultsOfFunctions(TorchFunctionMode):
    """Numbers the functions of a pass that return tensors of real numbers, and knows some of the results.

    Results that nothing else refers to any more are gone.

    Args:
        wanted: Numbers of the functions whose results are asked for.

    Attributes:
        count: How many there have been.
    """

    def __init__(self, wanted: Iterable[int] = ()) -> None:
        super().__init__()
        self.count = 0
        self._wanted = frozenset(wanted)
        self._found: dict[int, tuple[str, weakref.ref[Tensor]]] = {}

    def of(self, wanted: Result) -> Tensor | None:
        """Return a result; ``None`` if it is that of another function, is gone, or is not there yet."""
        name, result = self._found.get(wanted.number, ("", None))
        return result() if result is not None and name == wanted.name else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and count it."""
        result = func(*args, **(kwargs or {}))
        if _real_tensors(result):
            if isinstance(result, Tensor) and self.count in self._wanted:
                self._found[self.count] = func.__name__, weakref.ref(result)
            self.count += 1
        return result


class Result(NamedTuple):
    """The result of a function of a pass.

    Args:
        number: Number of the function.
        name: Its name.
    """

    number: int
    name: str


class LayerAhead(NamedTuple):
    """A term of a sum that comes from another layer, which runs later, but whose input is there already.

    Args:
        layer: Name of the layer.
        norm: Name of the batch norm between it and the sum; ``None`` if there is none.
        given: What the layer is called with.
    """

    layer: str
    norm: str | None
    given: Result

    def run(self, network: nn.Module, results: ResultsOfFunctions) -> Tensor | None:
        """Return the term; ``None`` if the input is not known.

        Args:
            network: The network.
            results: Results of a pass of it.
        """
        given = results.of(self.given)
        if given is None:
            return None
        layer = network.get_submodule(self.layer)
        value: Tensor = layer(given.to(next(layer.parameters()).dtype))  # not cast, as in a pass it may be
        return value if self.norm is None else network.get_submodule(self.norm)(value)


@dataclass(frozen=True, eq=False)
class SumTerms:
    """The other terms of the sums that a layer's output goes into.

    Args:
        results: Those that are there when the layer begins.
        layers: Those that can be.
        gain: What the outputs are multiplied by on the way, a number for each channel (dimension 1); ``None``
            if they are not.
    """

    results: Sequence[Result]
    layers: Sequence[LayerAhead]
    gain: Tensor | None

    @property
    def wanted(self) -> set[int]:
        """The numbers of the functions whose results are needed."""
        return {each.number for each in (*self.results, *(layer.given for layer in self.layers))}

    def change(
        self,
        before: tuple[nn.Module, ResultsOfFunctions],
        after: tuple[nn.Module, ResultsOfFunctions],
        rows: Callable[[Tensor], Sequence[Tensor] | None],
    ) -> list[Tensor] | None:
        """Return what has to be added to the layer's output for the sums to be as before.

        Args:
            before: The network as it was before, and results of a pass of it, as far as to the layer.
            after: The same of the network as it is now.
            rows: Returns the rows that count, for each group of channels, of a tensor of the output's shape.

        Returns:
            The rows; ``None`` where the two passes ran other functions, or no rows count.
        """
        changes = []
        for old, new in zip(self._values(*before), self._values(*after), strict=True):
            if old is None or new is None or old.shape != new.shape:
                return None
            pairs = zip(rows(old) or (), rows(new) or (), strict=True)
            changes.append(
                [one.to(torch.promote_types(one.dtype, torch.float32)) - other for one, other in pairs]
            )
        if len({tuple(part.shape for part in each) for each in changes}) != 1 or not changes[0]:
            return None
        total = [sum(parts[1:], parts[0]) for parts in zip(*changes, strict=True)]
        if self.gain is None:
            return total
        small = self.gain.abs() < _LEAST_GAIN * self.gain.abs().max()
        factors = torch.where(small, 0, 1 / self.gain).view(len(total), -1)
        return [part * factor for part, factor in zip(total, factors, strict=True)]

    def _values(self, network: nn.Module, results: ResultsOfFunctions) -> list[Tensor | None]:
        return [*map(results.of, self.results), *(each.run(network, results) for each in self.layers)]


def _real_tensors(result: object) -> bool:
    return any(isinstance(each, Tensor) and each.is_floating_point() for each in tree_leaves(result))
