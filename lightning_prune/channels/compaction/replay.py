"""Carries a plan out on a module, in place, and takes it back: the same parameters, of another size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.attention import set_attention_class_
from lightning_prune.channels.compaction.plan import Cut, Plan, check_attributes


@torch.no_grad()
def replay_(model: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] = ()) -> None:
    """Shrinks a module. Parameters stay the objects they are, so that optimizers keep their references.

    Args:
        model: Of the architecture that the plan was made for.
        plan: What to cut.
        optimizers: What they remember of a parameter in its shape is cut along with it; of a parameter of
            which they remember something in another shape they forget all.

    Raises:
        ValueError: If a tensor or module is missing or of another size; nothing has changed then.
    """
    tensors = _tensors(model)
    check_attributes(model, plan)
    cuts = {name: [cut for cut in plan.cuts if cut.name == name] for name in {cut.name for cut in plan.cuts}}
    for name, own in cuts.items():
        tensor = tensors[name]
        for optimizer in optimizers:
            _cut_optimizer_state(optimizer, tensor, own)
        tensor.data = cut_tensor(tensor.data, own)
        tensor.grad = None
    _set_attributes(model, plan, after=True)
    _reassign_tied(model)


@torch.no_grad()
def expand_(model: nn.Module, plan: Plan) -> None:
    """Takes a plan back: shapes are as before, with 0 where something was cut."""
    tensors = _tensors(model)
    for cut in reversed(plan.cuts):
        tensor = tensors[cut.name]
        sizes = list(tensor.shape)
        sizes[cut.dim] = cut.size
        places = torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device)
        whole = tensor.new_zeros(sizes).index_copy_(cut.dim, places, tensor.data)
        tensor.data = _like_layout(whole, tensor)
        tensor.grad = None
    _set_attributes(model, plan, after=False)
    _reassign_tied(model)


def _reassign_tied(model: nn.Module) -> None:
    """Puts tensors where they are: torch 2.6 compiles again if a dict has changed, not if a shape in it has."""
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in list(tensors.items()):
                tensors[name] = None
                tensors[name] = tensor


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """A copy of the places that stay, in the tensor's memory layout."""
    lines = [torch.arange(size, device=tensor.device) for size in tensor.shape]
    for cut in cuts:
        lines[cut.dim] = torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device)
    # all at once: cut by cut, half of a large one would be there twice
    return _like_layout(tensor[torch.meshgrid(*lines, indexing="ij")], tensor)


def _like_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Contiguous, its dimensions following each other in memory as in another tensor."""
    # where strides are equal, as with a single channel, channels_last has dimension 1 innermost
    strides = like.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim == 1))
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    lined = tensor.permute(order)
    # from one line, dimensions of size 1 get the usual strides too: by those, kernels are chosen
    return lined.reshape(-1).view(lined.shape).permute(back)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def _set_attributes(model: nn.Module, plan: Plan, *, after: bool) -> None:
    modules = dict(model.named_modules())
    for name, changes in plan.attributes.items():
        for key, change in changes.items():
            setattr(modules[name], key, change[after])
    for name in plan.attributes:
        set_attention_class_(modules[name])


def _cut_optimizer_state(optimizer: Optimizer, parameter: Tensor, cuts: list[Cut]) -> None:
    state = optimizer.state.get(parameter, {})
    shaped = [value for value in state.values() if torch.is_tensor(value) and value.numel() > 1]
    if any(value.shape != parameter.shape for value in shaped):
        del optimizer.state[parameter]
        return
    for key, value in state.items():
        if torch.is_tensor(value) and value.shape == parameter.shape:
            state[key] = cut_tensor(value, cuts)
