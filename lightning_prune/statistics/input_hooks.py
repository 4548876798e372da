"""Forward hooks that observe the inputs of layers, and their gradients, in single training steps."""

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

from lightning_prune.core.module_kinds import CONV1D, is_a
from lightning_prune.statistics.losses import SumOverRanks
from lightning_prune.statistics.observer import ActivationObserver
from lightning_prune.statistics.sums import Statistics
from lightning_prune.units.groups import UnitGroup
from lightning_prune.units.slices import AxisSlice

LayerInput: TypeAlias = tuple[nn.Module, AxisSlice]  # a layer, and its weight along its input dimension


def layer_inputs(model: nn.Module, group: UnitGroup) -> list[LayerInput]:
    """Return the layers that read a group's units, and whose inputs a hook can observe.

    Returns:
        Pairs of a linear or convolution layer, or Hugging Face's ``Conv1D``, and its weight, as a slice along
        the input dimension.
    """
    readers = {id(part.weight): part for part in group.readers}
    return [
        (module, readers[id(weight)])
        for module in model.modules()
        if (isinstance(module, nn.Linear | _ConvNd) or is_a(module, CONV1D))
        # nn.MultiheadAttention uses the weight of its projection, but never calls the layer
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and (weight := module._parameters.get("weight")) is not None
        and id(weight) in readers
        # for units within one weight: in a grouped convolution, each group reads inputs of its own
        and (group.input_dim is None or getattr(module, "groups", 1) == 1)
    ]


class InputHooks:
    """Observes the inputs of layers, and adds the observations to statistics once their training step is taken.

    Forward passes without gradients, such as those of a teacher, are not observed, unless ``forward_alone``.

    Args:
        criterion: Computes one number an example and feature from the inputs.
        groups: Each group with the layers that read it.
        statistics: Group name to the statistics to add to.
        left_out: A 0-d integer tensor. 1 is added for each observed step that is left out.
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
        self._seen = self._zeros()
        self._forward_alone = False
        self._without_gradient: list[tuple[UnitGroup, Tensor, int]] = []
        self._pending = False  # whether a step was observed and has not ended, the same in all processes

    @contextmanager
    def observe_batch(
        self, batch: int, scale: Callable[[], float], *, forward_alone: bool = False
    ) -> Iterator[None]:
        """Observe one forward and backward pass in a ``with`` block; an error drops the step.

        Args:
            batch: Number of the batch. A batch that the criterion's ``every`` does not divide is observed only
                while nothing has been observed since the last event.
            scale: Returns the factor by which the loss, and so its gradients, are scaled. Called in the
                backward pass.
            forward_alone: Whether forward passes count where no gradient at all is seen in the step.
        """
        self._forward_alone = forward_alone
        if batch % self._criterion.every == 0 or not self._has_observations():
            self._hook(scale)
        try:
            yield
        except BaseException:
            self._unhook()
            self.drop()
            raise
        self._unhook()

    def _has_observations(self) -> bool:
        return self._pending or any(int(statistics.count) for statistics in self._statistics.values())

    def _hook(self, scale: Callable[[], float]) -> None:
        self._scale = scale
        self._pending = True
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

    def _zeros(self) -> dict[str, Statistics]:
        return {
            name: Statistics({}, torch.zeros_like(sums.count), torch.zeros_like(sums.features))
            for name, sums in self._statistics.items()
        }

    def end_step(
        self, taken: Callable[[], bool] = lambda: True, add_up: SumOverRanks = lambda tensor: tensor
    ) -> None:
        """Add the observations since the last step to the statistics, if all of them are finite.

        Args:
            taken: Returns whether the optimizer takes the step. If not, the step is left out, as one with nan.
            add_up: Returns the sum of a tensor over all processes, which call it at the same time.
        """
        if not self._pending:
            return
        if not any(int(each.count) for each in self._seen.values()):
            for given in self._without_gradient:
                self._add(*given)
        seen = list(self._seen.values())
        device = self._left_out.device
        found = torch.cat([each.features.to(device) for each in seen])
        features = add_up(found + (0 if taken() else torch.nan))
        counts = add_up(torch.stack([each.count.to(device) for each in seen]))
        self.drop()
        valid = bool(features.isfinite().all())  # a sum of all processes: inf or nan in one of them is in all
        self._left_out.add_(not valid and bool(counts.any()))
        if valid:
            parts = features.split([len(each.features) for each in seen])
            for statistics, part, count in zip(self._statistics.values(), parts, counts, strict=True):
                statistics.features.add_(part.to(statistics.features.device))
                statistics.count.add_(count.to(statistics.count.device))

    def drop(self) -> None:
        """Drop the observations since the last step."""
        self._seen = self._zeros()
        self._without_gradient.clear()
        self._pending = bool(self._handles)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(
        self, group: UnitGroup, reader: AxisSlice, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if not torch.is_grad_enabled() and not self._forward_alone:
            return
        addend = self._addend(group, reader, _input_of(args, kwargs).detach(), None)
        if self._forward_alone:
            self._without_gradient.append((group, *addend))
        if output.requires_grad:
            # activation checkpointing repeats the forward pass: add only the one whose output gets a gradient
            output.register_hook(partial(self._add_once, group, [addend]))
        elif torch.is_grad_enabled():
            self._add(group, *addend)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, group: UnitGroup, reader: AxisSlice, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        given = _input_of(args, kwargs)
        trains = reader.weight.requires_grad
        if not trains and not given.requires_grad:
            return None  # neither the weight nor the input needs a gradient, so there is none
        # an autograd node of its own: its gradient is the part that flows through this layer alone
        seen = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
        # autograd does not detect that the input of a frozen layer was changed in place, so copy it
        held = given.detach() if trains else given.detach().clone()
        seen.register_hook(lambda grad: self._add(group, *self._addend(group, reader, held, grad)))
        return ((seen, *args[1:]), kwargs) if args else ((), kwargs | {"input": seen})

    @torch.no_grad()
    def _addend(
        self, group: UnitGroup, reader: AxisSlice, given: Tensor, grad: Tensor | None
    ) -> tuple[Tensor, int]:
        """Return what one forward pass adds to the sums.

        Args:
            group: The unit group.
            reader: The weight of the layer that reads it.
            given: The layer's inputs.
            grad: The gradient of the scaled loss with respect to them, if the criterion needs it.

        Returns:
            One number a feature, summed over examples, nan if an input is not finite; and the number of
            examples.
        """
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
    """Return a layer's inputs, batched or not, as examples x features x positions."""
    convolution = reader.weight.ndim > 2
    batched = given.ndim > (reader.weight.ndim - 1 if convolution else 1)
    inputs = given if batched else given[None]
    inputs = inputs.movedim(1 if convolution else -1, 1).flatten(2) if inputs.ndim > 2 else inputs[..., None]
    if reader.index is None:
        return inputs
    features = inputs.movedim(1, 0)
    # the index is the same for each group of a grouped convolution
    index = reader.index.repeat(len(features) // len(reader.index))
    rows = AxisSlice(reader.name, features, 0, index).vectors(features)
    return rows.view(len(rows), -1, *features.shape[1:]).permute(2, 0, 1, 3).flatten(2)
