"""What layers read: hooks on their inputs, for one forward and backward pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from lightning_prune.statistics.losses import SumOverRanks
from lightning_prune.statistics.observer import ActivationObserver
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice

LayerInput: TypeAlias = tuple[nn.Module, AxisSlice]  # a layer, and its weight along what it reads


def layer_inputs(model: nn.Module, group: UnitGroup) -> list[LayerInput]:
    """The layers that read a group's units and whose inputs can be looked at."""
    readers = {id(part.weight): part for part in group.readers}
    return [
        (module, readers[id(weight)])
        for module in model.modules()
        if isinstance(module, nn.Linear | _ConvNd)
        # attention takes the weight alone
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and (weight := module._parameters.get("weight")) is not None
        and id(weight) in readers
        # within one tensor, each group of a grouped convolution reads inputs of its own
        and (group.input_dim is None or getattr(module, "groups", 1) == 1)
    ]


class InputHooks:
    """Looks at what layers are given, and keeps it until it is known whether their training step is taken.

    Passes without gradients, as those of a teacher, are left alone.

    Args:
        criterion: What is looked for.
        groups: Each group with the layers that read it.
        statistics: Group name to what is added to.
        left_out: Is counted up for a step that does not count.
    """

    def __init__(
        self,
        criterion: ActivationObserver,
        groups: Sequence[tuple[UnitGroup, Sequence[LayerInput]]],
        statistics: Mapping[str, Statistics],
        left_out: Tensor,
    ) -> None:
        self._criterion = criterion
        self._groups = groups
        self._statistics = statistics
        self._left_out = left_out
        self._scale: Callable[[], float] = lambda: 1.0
        self._handles: list[RemovableHandle] = []
        self._seen = self._nothing()
        self._waits = False  # in all processes alike

    @contextmanager
    def look(self, batch: int, scale: Callable[[], float]) -> Iterator[None]:
        """Looks while the block lasts: at one forward and backward pass. An error gives the whole step up.

        Args:
            batch: Its number. Of those that the criterion's ``every`` does not divide, one is looked at only
                while nothing was seen since the last event.
            scale: Tells in a backward pass what gradients are multiples of: that of the loss.
        """
        if batch % self._criterion.every == 0 or not self._anything_seen:
            self._hook(scale)
        try:
            yield
        except BaseException:
            self._unhook()
            self.forget()
            raise
        self._unhook()

    @property
    def _anything_seen(self) -> bool:
        return self._waits or any(int(statistics.count) for statistics in self._statistics.values())

    def _hook(self, scale: Callable[[], float]) -> None:
        self._scale = scale
        self._waits = True
        for group, layers in self._groups:
            for module, reader in layers:
                if self._criterion.backward:
                    before = partial(self._before, group, reader)
                    self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                else:
                    after = partial(self._after, group, reader)
                    self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _nothing(self) -> dict[str, Statistics]:
        return {
            name: Statistics({}, torch.zeros_like(sums.count), torch.zeros_like(sums.features))
            for name, sums in self._statistics.items()
        }

    def end_step(
        self, taken: Callable[[], bool] = lambda: True, add_up: SumOverRanks = lambda tensor: tensor
    ) -> None:
        """Adds what was seen since the last step to the statistics, if all of it is finite.

        Args:
            taken: Is asked whether the step is; one that is not counts as if something were nan.
            add_up: Gives the sum of a tensor over all processes, which look at the same time.
        """
        if not self._waits:
            return
        names = list(self._seen)
        found = [self._seen[name].features.to(self._left_out.device) for name in names]
        features = add_up(torch.cat(found) + (0 if taken() else torch.nan))
        counts = add_up(torch.stack([self._seen[name].count.to(self._left_out.device) for name in names]))
        self.forget()
        valid = bool(features.isfinite().all())  # where one process has inf or nan, all have
        self._left_out.add_(not valid and bool(counts.any()))
        if valid:
            parts = features.split([len(each) for each in found])
            for name, part, count in zip(names, parts, counts, strict=True):
                statistics = self._statistics[name]
                statistics.features.add_(part.to(statistics.features.device))
                statistics.count.add_(count.to(statistics.count.device))

    def forget(self) -> None:
        """Gives up what was seen since the last step."""
        self._seen = self._nothing()
        self._waits = bool(self._handles)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(
        self, group: UnitGroup, reader: AxisSlice, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        looked_at = self._look(group, reader, _input_of(args, kwargs).detach(), None)
        if output.requires_grad:
            # of passes that checkpointing computes again, one gets a gradient
            output.register_hook(partial(self._add_once, group, [looked_at]))
        else:
            self._add(group, *looked_at)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, group: UnitGroup, reader: AxisSlice, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        given = _input_of(args, kwargs)
        learns = reader.weight.requires_grad
        if not learns and not given.requires_grad:
            return None  # frozen all the way: no gradient comes here
        # a node of its own, whose gradient comes through this layer alone
        seen = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
        # of a frozen layer, autograd does not notice a change in place
        held = given.detach() if learns else given.detach().clone()
        seen.register_hook(lambda grad: self._add(group, *self._look(group, reader, held, grad)))
        return ((seen, *args[1:]), kwargs) if args else ((), kwargs | {"input": seen})

    @torch.no_grad()
    def _look(
        self, group: UnitGroup, reader: AxisSlice, given: Tensor, grad: Tensor | None
    ) -> tuple[Tensor, int]:
        """What one pass adds for each feature, and of how many examples."""
        inputs = _by_feature(given.to(group.dtype), reader)
        grads = None if grad is None else _by_feature(grad.to(group.dtype) / self._scale(), reader)
        found = self._criterion.look(inputs, grads)
        finite = inputs.isfinite().all()
        return torch.where(finite, found.sum(0), torch.nan), len(found)

    def _add_once(self, group: UnitGroup, pending: list[tuple[Tensor, int]], grad: Tensor) -> None:
        if pending:
            self._add(group, *pending.pop())

    def _add(self, group: UnitGroup, features: Tensor, count: int) -> None:
        seen = self._seen[group.name]
        seen.features.add_(features)
        seen.count.add_(count)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given: Tensor = args[0] if args else kwargs["input"]
    return given


def _by_feature(given: Tensor, reader: AxisSlice) -> Tensor:
    """A layer's inputs as examples x features x positions."""
    convolution = reader.weight.ndim > 2
    batched = given.ndim > (reader.weight.ndim - 1 if convolution else 1)
    inputs = given if batched else given[None]
    inputs = inputs.movedim(1 if convolution else -1, 1).flatten(2) if inputs.ndim > 2 else inputs[..., None]
    if reader.index is None:
        return inputs
    lines = inputs.movedim(1, 0)
    index = reader.index.repeat(len(lines) // len(reader.index))  # once for each group of a grouped convolution
    rows = AxisSlice(reader.name, lines, 0, index).vectors(lines)
    return rows.view(len(rows), -1, *lines.shape[1:]).permute(2, 0, 1, 3).flatten(2)
