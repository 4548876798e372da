"""Application of a plan to a module, in place and together with optimizer state, and its reversal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.channels.compaction.attention import set_attention_class_
from lightning_prune.channels.compaction.experts import renumber_, set_removed_, undo_renumbering_
from lightning_prune.channels.compaction.norms import NarrowLayerNorm, set_norm_class_
from lightning_prune.channels.compaction.own_norms import OwnNorm, own_norms
from lightning_prune.channels.compaction.plan import Cut, Plan, check_attributes, check_experts
from lightning_prune.channels.compaction.whole_numbers import set_number_
from lightning_prune.core.averages import Average
from lightning_prune.core.tensors import tensors_by_name


@torch.no_grad()
def replay_(
    model: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] = (), averages: Iterable[Average] = ()
) -> None:
    """Apply a plan to a module. Parameters stay the same objects, so that optimizers keep their references.

    Gradients of the parameters that are cut are set to ``None``.

    Args:
        model: A module of the architecture that the plan was made for.
        plan: The plan.
        optimizers: Optimizers whose state is cut along. State tensors with the shape of their parameter are cut
            as it is; if a parameter has a state tensor of another shape with more than one element, all its
            state is dropped.
        averages: Weight averages outside the module; they are cut in the same way.

    Raises:
        ValueError: If a tensor or module is missing or has another size; the module is unchanged then.
    """
    tensors = tensors_by_name(model)
    check_attributes(model, plan)
    check_experts(model, plan)
    names = {cut.name for cut in plan.cuts}
    norms = own_norms(model, names)
    for name in names:
        tensor, cuts = tensors[name], plan.cuts_of(name)
        for optimizer in optimizers:
            _cut_optimizer_state(optimizer, tensor, cuts)
        _set_data_(tensor, cut_tensor(tensor.data, cuts))
    _set_attributes(model, plan, norms, after=True)
    for name in plan.removed:
        set_removed_(model.get_submodule(name), removed=True)
    for name, shares in plan.numbered:
        cut = plan.cut_of_stack(name)
        assert cut is not None
        renumber_(model.get_submodule(name), cut.size, cut.kept, shares)
    _reassign_tensors(model)
    for average in averages:
        replay_(average.module, plan.renamed(average.names))


@torch.no_grad()
def expand_(
    model: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] = (), averages: Iterable[Average] = ()
) -> None:
    """Revert a plan: restore the shapes and attributes before it, with 0 for all elements that were cut.

    Args:
        model: The module that the plan was applied to.
        plan: The plan.
        optimizers: Optimizers whose state tensors with the shape of their parameter are expanded along.
        averages: Weight averages outside the module; they are expanded in the same way.
    """
    tensors = tensors_by_name(model)
    names = {cut.name for cut in plan.cuts}
    norms = own_norms(model, names)
    for name in names:
        tensor, cuts = tensors[name], plan.cuts_of(name)
        for state in (optimizer.state.get(tensor, {}) for optimizer in optimizers):
            same = {key: each for key, each in state.items() if _has_shape(each, tensor.shape)}
            state.update({key: expand_tensor(each, cuts) for key, each in same.items()})
        _set_data_(tensor, expand_tensor(tensor.data, cuts))
    _set_attributes(model, plan, norms, after=False)
    for name in plan.removed:
        set_removed_(model.get_submodule(name), removed=False)
    for name, _ in plan.numbered:
        undo_renumbering_(model.get_submodule(name))
    _reassign_tensors(model)
    for average in averages:
        expand_(average.module, plan.renamed(average.names))


def _reassign_tensors(model: nn.Module) -> None:
    """Assign each parameter and buffer to its own name again, so that compiled modules are compiled again.

    torch 2.6 recompiles if the dicts of a module have changed, but not if the shape of a tensor in them has.
    Scripted modules, which nothing cuts, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        owned: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in owned:
            for name, tensor in list(tensors.items()):
                tensors[name] = None
                tensors[name] = tensor


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """Return a copy of the elements that are kept, in the memory layout of the tensor."""
    found = tensor
    for cut in sorted(cuts, key=lambda cut: cut.dim):  # rows first, which lie together in memory
        found = found.index_select(cut.dim, torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device))
    return tensor.clone() if found is tensor else _like_layout(found, tensor)


def expand_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """Return the tensor from before some cuts, in its memory layout, with 0 or False for what was cut."""
    whole = tensor
    for cut in cuts:
        sizes = list(whole.shape)
        sizes[cut.dim] = cut.size
        places = torch.tensor(cut.kept, dtype=torch.int64, device=tensor.device)
        whole = whole.new_zeros(sizes).index_copy_(cut.dim, places, whole)
    return _like_layout(whole, tensor)


def _set_data_(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer data of another shape, and no gradient."""
    tensor.grad = None
    # the node that accumulates its gradient knows the shape, and lives as long as a loss that a user keeps;
    # data of another type make it anew
    tensor.data = data.new_empty(0, dtype=torch.float64 if data.dtype is torch.float32 else torch.float32)
    tensor.data = data


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return torch.is_tensor(value) and value.shape == shape


def _like_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor without gaps in memory, its dimensions in the same memory order as those of ``like``."""
    # of two dimensions with equal strides one has size 1, and is the inner one
    strides = like.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], like.shape[dim] == 1))
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    ordered = tensor.permute(order)
    # a view of a flat tensor has the usual strides in dimensions of size 1, too: kernels are chosen by strides
    return ordered.reshape(-1).view(ordered.shape).permute(back)


def _set_attributes(model: nn.Module, plan: Plan, norms: Mapping[nn.Module, OwnNorm], *, after: bool) -> None:
    modules = dict(model.named_modules())
    for name, changes in plan.attributes.items():
        for key, change in changes.items():
            set_number_(modules[name], key, change[after])
    for module, norm in norms.items():
        norm.set_(module)
    for module in modules.values():
        set_norm_class_(module)
        set_attention_class_(module)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN reads the weights of all layers as one piece of memory
    for module in modules.values():
        # its fused op, which a narrow attention rules out, would not know that its norms are narrow
        if isinstance(module, nn.TransformerEncoderLayer) and type(module.norm1) is NarrowLayerNorm:
            set_attention_class_(module.self_attn, narrow=True)


def _cut_optimizer_state(optimizer: Optimizer, parameter: Tensor, cuts: list[Cut]) -> None:
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value) and value.numel() > 1}
    if any(value.shape != parameter.shape for value in tensors.values()):
        del optimizer.state[parameter]
    else:
        state.update({key: cut_tensor(value, cuts) for key, value in tensors.items()})
