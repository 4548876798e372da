"""Weights of matrix products: those of known modules, and the dimension along which the inputs of one lie."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.module_kinds import CONV1D, is_a
from lightning_prune.core.probes import evaluation_mode

_EXAMPLES = 64


class _Known(NamedTuple):
    """Parameters of a kind of module that are weights of matrix products.

    Attributes:
        kind: The class of the module, or its full name if it may not be installed.
        pattern: Glob pattern of the parameters' names in the module.
        input_dim: The dimension that runs over inputs.
    """

    kind: type[nn.Module] | str
    pattern: str
    input_dim: int

    def holds(self, module: nn.Module, leaf: str) -> bool:
        """Return whether a parameter of a module is one of these."""
        return is_a(module, self.kind) and fnmatchcase(leaf, self.pattern)


_MATRICES = (
    _Known(nn.Linear, "weight", 1),
    _Known(nn.Bilinear, "weight", 1),
    _Known(_ConvTransposeNd, "weight", 0),
    _Known(_ConvNd, "weight", 1),
    _Known(nn.MultiheadAttention, "*_proj_weight", 1),
    _Known(nn.RNNBase, "weight_*", 1),
    _Known(nn.RNNCellBase, "weight_*", 1),
    _Known(CONV1D, "weight", 0),
)


def is_matrix(module: nn.Module, leaf: str) -> bool:
    """Return whether a parameter is a weight of a matrix product in a module of a known kind.

    Args:
        module: The module that holds the parameter.
        leaf: Name of the parameter in the module.
    """
    return any(each.holds(module, leaf) for each in _MATRICES)


def input_dim_of(module: nn.Module, leaf: str) -> int | None:
    """Return the dimension of a weight that runs over inputs; ``None`` if it is not known.

    That of a grouped transposed convolution is not one dimension. A module of an unknown kind is tried, on
    random inputs, if it has no other module within.

    Args:
        module: The module that holds the parameter.
        leaf: Name of the parameter in the module.
    """
    known = next((each.input_dim for each in _MATRICES if each.holds(module, leaf)), None)
    if known is not None:
        grouped = isinstance(module, _ConvTransposeNd) and module.groups > 1
        return None if grouped else known
    if getattr(module, leaf).ndim != 2 or any(True for _ in module.children()):
        return None
    return next((dim for dim in (1, 0) if _reads_along(module, leaf, dim)), None)


def _reads_along(module: nn.Module, leaf: str, dim: int) -> bool:
    """Return whether a module multiplies its one input by a matrix, whose inputs lie along this dimension.

    If so, the first output depends on the first row of the matrix alone, or on the first column.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        twin = copy_model(module).float()
        matrix = twin.get_parameter(leaf).requires_grad_()
        # of many, some pass whatever follows the product, such as a ReLU
        given = torch.randn(_EXAMPLES, matrix.shape[dim], generator=generator).to(matrix.device)
        with evaluation_mode(twin), torch.enable_grad():
            outputs = twin(given)
            (grad,) = torch.autograd.grad(outputs[:, 0].sum(), matrix)
    except Exception:  # a user's forward may raise anything on inputs of another kind
        return False
    used = grad.movedim(dim, 1) != 0
    whole = tuple(outputs.shape) == (_EXAMPLES, matrix.shape[1 - dim])
    return whole and bool(used[0].all()) and not bool(used[1:].any())
