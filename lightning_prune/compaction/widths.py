"""What a module says of its own width, as its tensors have it: one entry a kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@singledispatch
def widths(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """The attributes of a module that follow from the shapes of its tensors.

    Args:
        module: As it is before they change.
        shapes: Name within the module to shape, afterwards.
    """
    return {}


@widths.register
def _(module: nn.Linear, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    outward, inward = shapes["weight"]
    return {"in_features": inward, "out_features": outward}


@widths.register
def _(module: _ConvNd, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    outward, inward = shapes["weight"][:2]
    before = module.weight.shape
    # with one input a group, groups go with their channels; otherwise each of them shrinks
    groups = module.groups * outward // before[0] if before[1] == 1 else module.groups
    return {"in_channels": inward * groups, "out_channels": outward, "groups": groups}


@widths.register
def _(module: _ConvTransposeNd, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    inward, outward = shapes["weight"][:2]
    before = module.weight.shape
    groups = module.groups * inward // before[0] if before[1] == 1 else module.groups
    return {"in_channels": inward, "out_channels": outward * groups, "groups": groups}


@widths.register
def _(module: _NormBase, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    line = shapes.get("weight", shapes.get("running_mean"))
    return {} if line is None else {"num_features": line[0]}


@widths.register
def _(module: nn.GroupNorm, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    if "weight" not in shapes:
        return {}
    channels = shapes["weight"][0]
    return {"num_channels": channels, "num_groups": module.num_groups * channels // module.num_channels}


@widths.register
def _(module: nn.Embedding, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    return {"embedding_dim": shapes["weight"][1]}
