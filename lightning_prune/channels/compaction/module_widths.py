"""Size attributes of PyTorch modules, such as ``in_features``, computed from the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized


def widths(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return the size attributes of a module that follow from the shapes of its tensors.

    Args:
        module: The module before the cut.
        shapes: Tensor name within the module to shape after the cut.

    Returns:
        Attribute name to value; empty for a kind of module that is not known, and for one whose weight is
        computed from other parameters: such a module keeps its attributes.
    """
    # not getattr: to compute a weight with spectral norm changes its buffers
    if is_parametrized(module) or torch.is_tensor(vars(module).get("weight")):
        return {}
    own = (*module._parameters.items(), *module._buffers.items())
    before = {name: tensor.shape for name, tensor in own if tensor is not None}
    try:
        known = all(getattr(module, key) == size for key, size in _widths(module, before).items())
    except (KeyError, ValueError):  # a subclass whose weights have other names or dimensions
        known = False
    return _widths(module, shapes) if known else {}


def has_widths(module: nn.Module) -> bool:
    """Return whether it is known which attributes of a module follow from its tensors."""
    return _widths.dispatch(type(module)) is not _widths.dispatch(object)


@singledispatch
def _widths(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {}


@_widths.register
def _(module: nn.Linear, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    outputs, inputs = shapes["weight"]
    return {"in_features": inputs, "out_features": outputs}


@_widths.register
def _(module: _ConvNd, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    first, second = shapes["weight"][:2]
    groups = module.groups
    if groups > 1 and module.weight.shape[1] == 1:
        # depthwise: a group has one channel and is cut with it; otherwise all groups stay and become narrower
        groups = round(groups * first / module.weight.shape[0])
    outputs, inputs = first, second * groups
    if module.transposed:
        outputs, inputs = inputs, outputs
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


@_widths.register
def _(module: _NormBase, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    shape = shapes.get("weight", shapes.get("running_mean"))
    return {} if shape is None else {"num_features": shape[0]}


@_widths.register
def _(module: nn.GroupNorm, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    if "weight" not in shapes:
        return {}
    channels = shapes["weight"][0]
    # groups go whole, but for a single one, which becomes narrower
    groups = max(1, module.num_groups * channels // module.num_channels)
    return {"num_channels": channels, "num_groups": groups}


@_widths.register(nn.LayerNorm)
@_widths.register(nn.RMSNorm)
def _(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {}  # of which channels went is counted by the width of the weight: see norms.py


@_widths.register
def _(module: nn.MultiheadAttention, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    packed = "in_proj_weight" in shapes
    inner = shapes["in_proj_weight"][0] // 3 if packed else shapes["q_proj_weight"][0]
    return {"num_heads": inner // module.head_dim}


@_widths.register(nn.Embedding)
@_widths.register(nn.EmbeddingBag)
def _(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {"embedding_dim": shapes["weight"][1]}


@_widths.register
def _(module: nn.RNNBase, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    projected, hidden = shapes.get("weight_hr_l0", (0, shapes["weight_hh_l0"][1]))
    return {"input_size": shapes["weight_ih_l0"][1], "hidden_size": hidden, "proj_size": projected}


@_widths.register
def _(module: nn.RNNCellBase, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}
