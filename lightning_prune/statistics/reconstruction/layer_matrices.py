"""Layers as matrix products: the rows that one multiplies by its weight, and its weight as a matrix."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from lightning_prune.core.module_kinds import CONV1D, is_a
from lightning_prune.statistics.reconstruction.patches import chosen_positions, patches, sides, split_dim
from lightning_prune.statistics.reconstruction.sum_terms import ResultsOfFunctions

_NO_RESULTS = ResultsOfFunctions()


class LayerCall(NamedTuple):
    """The arguments with which a layer is called, and what functions have returned in the pass until then."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: ResultsOfFunctions = _NO_RESULTS

    def argument(self, place: int, name: str) -> Any:
        """Return an argument that is given by position or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs[name]

    @property
    def first(self) -> Any:
        """The first argument: by position or, if there is none, by name."""
        return self.args[0] if self.args else self.kwargs.get("input", next(iter(self.kwargs.values())))

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the tensors among the arguments."""
        return [each.shape for each in tree_leaves((self.args, dict(self.kwargs))) if isinstance(each, Tensor)]


@dataclass(frozen=True)
class LayerMatrix(ABC):
    """A matrix in a layer, by which rows are multiplied that are taken from the layer's input.

    Args:
        module: The layer.
        weight_name: Name of the parameter that holds the matrix, within the layer.
        bias_name: Name of the bias that is added to the products, as far as there is one.
    """

    module: Any
    weight_name: str = "weight"
    bias_name: str = "bias"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the matrix."""
        return self.module.get_parameter(self.weight_name)  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias; ``None`` if there is none."""
        place, _, name = self.bias_name.rpartition(".")
        found: nn.Parameter | None = self.module.get_submodule(place)._parameters.get(name)
        return found

    @abstractmethod
    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return the rows that are multiplied by the matrix: for each group of shape rows x columns.

        Args:
            call: The arguments of the layer.
            positions: How many positions of a feature map are taken of each example, spread evenly.
        """

    @abstractmethod
    def output_rows(self, output: Tensor, positions: int) -> Sequence[Tensor] | None:
        """Return the parts of the layer's output that the products of :meth:`rows` with the matrix give.

        Args:
            output: A tensor of the shape of the layer's output.
            positions: As for :meth:`rows`.

        Returns:
            For each group a tensor of shape rows x outputs; ``None`` if the products are not the output.
        """

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as a matrix: of shape groups x outputs of a group x columns."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as a weight; the inverse of :meth:`matrix`."""


class LinearMatrix(LayerMatrix):
    """A linear layer, whose weight is stored outputs first."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return the input as rows; all positions count."""
        return [call.first.reshape(-1, call.first.shape[-1])]

    def output_rows(self, output: Tensor, positions: int) -> Sequence[Tensor] | None:
        """Return the output as rows."""
        return [output.reshape(-1, output.shape[-1])]

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as it is."""
        return weight[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix as it is."""
        return matrix[0]


class InputsFirstMatrix(LinearMatrix):
    """A linear layer whose weight is stored inputs first, as Hugging Face's ``Conv1D``."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the transposed weight."""
        return weight.t()[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the transposed matrix."""
        return matrix[0].t()


class RecurrentMatrix(LinearMatrix):
    """The weights by which the first layer of an LSTM, GRU or RNN multiplies its input."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return the input, which may be packed, as rows."""
        given = call.first.data if isinstance(call.first, PackedSequence) else call.first
        return [given.reshape(-1, given.shape[-1])]

    def output_rows(self, output: Tensor, positions: int) -> Sequence[Tensor] | None:
        """Return ``None``: the products are a part of the gates."""
        return None


class AttentionInputMatrix(LayerMatrix):
    """The weights of queries, keys and values of ``nn.MultiheadAttention``, as three groups."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return query, key and value as rows."""
        given = [call.argument(place, name) for place, name in enumerate(("query", "key", "value"))]
        return [each.reshape(-1, each.shape[-1]) for each in given]

    def output_rows(self, output: Tensor, positions: int) -> Sequence[Tensor] | None:
        """Return ``None``: the products are queries, keys and values."""
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight with a group for each of the three."""
        return split_dim(weight, 0, 3)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the weight."""
        return matrix.flatten(0, 1)


class AttentionOutputMatrix(LinearMatrix):
    """The output projection of ``nn.MultiheadAttention``, which multiplies what all heads give."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return what the heads give, with the present weights, as rows."""
        heads = copy.copy(self.module)
        size, like = self.module.embed_dim, self.parameter
        projection = nn.Linear(size, size, device=like.device, dtype=like.dtype)
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
        heads._modules = {"out_proj": projection}
        arguments = signature(self.module.forward).bind(*call.args, **call.kwargs).arguments
        given = heads.forward(**{**arguments, "need_weights": False})[0]
        return [given.reshape(-1, size)]


class ConvMatrix(LayerMatrix):
    """A convolution: a row is the part of the input under the kernel at one position of the output."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return the rows at some positions of each example."""
        module = self.module
        image = self._batched(call.first)
        if module.padding_mode == "zeros":
            image = F.pad(image, sides(module))
        else:
            image = F.pad(image, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        rows = patches(image, module.kernel_size, module.stride, module.dilation, module.groups, positions)
        return list(rows)

    def output_rows(self, output: Tensor, positions: int) -> Sequence[Tensor] | None:
        """Return the output at the same positions."""
        flat = self._batched(output).flatten(2)
        parts = split_dim(
            flat[:, :, chosen_positions(flat.shape[2], positions, flat.device)], 1, self.module.groups
        )
        return list(parts.permute(1, 0, 3, 2).flatten(1, 2))

    def _batched(self, given: Tensor) -> Tensor:
        return given if given.ndim == len(self.module.kernel_size) + 2 else given[None]

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight with inputs and positions of the kernel as columns."""
        return split_dim(weight.flatten(1), 0, self.module.groups)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the weight."""
        shape: torch.Size = self.module.weight.shape
        return matrix.flatten(0, 1).reshape(shape)


class TransposedConvMatrix(ConvMatrix):
    """A transposed convolution: a convolution, by the flipped kernel, of the input with zeros in between."""

    def rows(self, call: LayerCall, positions: int) -> Sequence[Tensor]:
        """Return the rows at some positions of each example."""
        module, image = self.module, self._batched(call.first)
        sizes = [(size - 1) * step + 1 for size, step in zip(image.shape[2:], module.stride, strict=True)]
        spread = image.new_zeros(*image.shape[:2], *sizes)
        where = (slice(None), slice(None), *(slice(None, None, step) for step in module.stride))
        spread[where] = image
        sides: list[int] = []
        for size, step, padding, extra in zip(
            module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
        ):
            before = step * (size - 1) - padding
            sides = [before, before + extra, *sides]
        one = (1,) * len(module.kernel_size)
        padded = F.pad(spread, sides)
        return list(patches(padded, module.kernel_size, one, module.dilation, module.groups, positions))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the flipped weight with inputs and positions of the kernel as columns."""
        parts = split_dim(weight.flip(*range(2, weight.ndim)), 0, self.module.groups)
        return parts.transpose(1, 2).flatten(2)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the weight."""
        shape: torch.Size = self.module.weight.shape
        parts = matrix.reshape(*matrix.shape[:2], shape[0] // self.module.groups, *shape[2:]).transpose(1, 2)
        return parts.flatten(0, 1).flip(*range(2, len(shape)))


def layer_matrices(module: nn.Module) -> list[LayerMatrix]:
    """Return the matrices of a layer, in the order in which it uses them; none if its kind is not known."""
    if is_a(module, CONV1D):
        return [InputsFirstMatrix(module)]
    if not all(_is_torch_code(module, name) for name in ("forward", "_conv_forward")):
        return []  # a subclass may do anything with its weight
    return next((matrices(module) for kind, matrices in _KINDS.items() if isinstance(module, kind)), [])


def _of_attention(module: Any) -> list[LayerMatrix]:
    inputs = AttentionInputMatrix(module, "in_proj_weight", "in_proj_bias")
    outputs = AttentionOutputMatrix(module, "out_proj.weight", "out_proj.bias")
    return [inputs, outputs] if module._qkv_same_embed_dim else [outputs]


def _of_recurrent(module: Any) -> list[LayerMatrix]:
    ends = ("l0", "l0_reverse") if module.bidirectional else ("l0",)
    return [RecurrentMatrix(module, f"weight_ih_{end}", f"bias_ih_{end}") for end in ends]


# the first kind that fits counts
_KINDS: dict[type[nn.Module], Callable[[Any], list[LayerMatrix]]] = {
    NonDynamicallyQuantizableLinear: lambda module: [],  # nn.MultiheadAttention never calls it
    nn.MultiheadAttention: _of_attention,
    nn.RNNBase: _of_recurrent,
    nn.Linear: lambda module: [LinearMatrix(module)],
    _ConvTransposeNd: lambda module: [TransposedConvMatrix(module)],
    _ConvNd: lambda module: [ConvMatrix(module)],
}


def _is_torch_code(module: nn.Module, name: str) -> bool:
    """Return whether a method of a module, if it has one of this name, is the one of torch."""
    method = getattr(type(module), name, None)
    return method is None or str(method.__module__).startswith("torch.")


def named_matrices(model: nn.Module) -> dict[str, tuple[str, LayerMatrix]]:
    """Return the known matrices of a model: name of the parameter to the name of the layer, and the matrix."""
    return {
        f"{place}.{matrix.weight_name}".lstrip("."): (place, matrix)
        for place, module in model.named_modules()
        for matrix in layer_matrices(module)
    }
