"""What a module says of its own width, as its tensors have it: one entry a kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized


def widths(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The attributes of a module that follow from the shapes of its tensors.

    Args:
        module: As it is before they change.
        shapes: Name within the module to shape, afterwards. Of a weight that is computed from others there is
            none: such a module says what it did before.
    """
    # the attribute itself is not to be looked at: spectral norms change when it is computed
    computed = is_parametrized(module) or torch.is_tensor(vars(module).get("weight"))
    return {} if computed else _widths(module, shapes)


def has_widths(module: nn.Module) -> bool:
    """Whether it is known which attributes of a module follow from its tensors."""
    return _widths.dispatch(type(module)) is not _widths.dispatch(object)


@singledispatch
def _widths(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {}


@_widths.register
def _(module: nn.Linear, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    outward, inward = shapes["weight"]
    return {"in_features": inward, "out_features": outward}


@_widths.register
def _(module: _ConvNd, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    outward, inward = shapes["weight"][:2]
    groups = _groups(module, outward / module.weight.shape[0])
    return {"in_channels": inward * groups, "out_channels": outward, "groups": groups}


@_widths.register
def _(module: _ConvTransposeNd, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    inward, outward = shapes["weight"][:2]
    groups = _groups(module, inward / module.weight.shape[0])
    return {"in_channels": inward, "out_channels": outward * groups, "groups": groups}


def _groups(module: _ConvNd, share: float) -> int:
    # with one channel each, groups go with their channels; otherwise all are there and shrink
    alone = module.groups > 1 and module.weight.shape[1] == 1
    return round(module.groups * share) if alone else module.groups


@_widths.register
def _(module: _NormBase, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    line = shapes.get("weight", shapes.get("running_mean"))
    return {} if line is None else {"num_features": line[0]}


@_widths.register
def _(module: nn.GroupNorm, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    if "weight" not in shapes:
        return {}
    channels = shapes["weight"][0]
    return {"num_channels": channels, "num_groups": module.num_groups * channels // module.num_channels}


@_widths.register
def _(module: nn.MultiheadAttention, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    packed = "in_proj_weight" in shapes
    inner = shapes["in_proj_weight"][0] // 3 if packed else shapes["q_proj_weight"][0]
    return {"num_heads": inner // module.head_dim}


@_widths.register
def _(module: nn.Embedding, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {"embedding_dim": shapes["weight"][1]}
