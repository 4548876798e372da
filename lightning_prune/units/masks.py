"""The masks of a model's parameters: enforced in weights, gradients and optimizer state, packed when saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_prune.core import schema
from lightning_prune.core.averages import Average
from lightning_prune.core.tensors import opaque
from lightning_prune.units.groups import UnitGroup, row_ranges
from lightning_prune.units.shards import Shards, Unsharded, is_sharded, shard_like, to_local

BITS = schema.dense_tensor("a tensor of bytes", lambda bits: bits.dtype == torch.uint8 and bits.ndim == 1)
MASKS = schema.mapping(schema.record({"bits": BITS, "shape": schema.sequence(schema.integer())}))
Masks: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]  # by parameter name, True where kept
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskStore:
    """Bool masks by parameter name, True where a weight is kept; only this class sets masked weights to 0.

    Args:
        model: The module whose parameters are masked, by their names in ``named_parameters()``.
        names: Names of the parameters to mask. Each mask starts all True, on the parameter's device, in its
            memory layout, and divided among processes as the parameter is.
        shards: The processes among which parameters are divided, if they are.

    Attributes:
        shards: The processes among which parameters and masks are divided.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], shards: Shards = Unsharded()) -> None:
        self.shards = shards
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._masks = {name: self._fresh(name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copied or unpickled store, whose parameters are other objects."""
        vars(self).update(state)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _fresh(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return shard_like(torch.ones_like(to_local(parameter), dtype=torch.bool), parameter)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks by parameter name, not copies."""
        return MappingProxyType(self._masks)

    @property
    def removed(self) -> int:
        """Number of masked weights, in all processes."""
        here = [to_local(mask) for mask in self._masks.values()]
        removed = sum(mask.numel() - int(mask.count_nonzero()) for mask in here)
        return int(self.shards.add_up(torch.tensor(removed)))

    @property
    def enforced(self) -> bool:
        """Whether each masked weight that this process holds is exactly 0."""
        held = ((to_local(self._parameters[name]), to_local(mask)) for name, mask in self._masks.items())
        return not any(bool(parameter[~mask].count_nonzero()) for parameter, mask in held)

    def digest(self) -> str:
        """Return a SHA-256 hex digest of the names and masks, to compare masks between processes."""
        digest = hashlib.sha256()
        for name, mask in sorted(self._masks.items()):
            digest.update(name.encode())
            digest.update(pack(mask).numpy().tobytes())
        return digest.hexdigest()

    def named(self, parameters: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return those of the given parameters that have a mask, by name."""
        found = ((self._names.get(id(parameter), ""), parameter) for parameter in parameters)
        return {name: parameter for name, parameter in found if name in self._masks}

    def keep(self, group: UnitGroup, units: Tensor) -> None:
        """Mask all units of a group but these, given for the rows that this process holds; weights stay."""
        for part in group.here.masked:
            to_local(self._masks[part.name]).logical_and_(part.spread(units))

    def restrict(self, masks: Mapping[str, Tensor]) -> None:
        """Mask also what these whole masks do, of any of the model's parameters; weights stay."""
        for name, mask in masks.items():
            if name not in self._masks and not mask.all():
                self._masks[name] = self._fresh(name)
            if name in self._masks:
                own = self.shards.own(mask) if is_sharded(self._parameters[name]) else mask
                to_local(self._masks[name]).logical_and_(own.to(self._masks[name].device))

    def drop(self, names: Iterable[str]) -> None:
        """Forget the masks of these parameters, if they have any."""
        for name in names:
            self._masks.pop(name, None)

    @torch.no_grad()
    def apply_(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Set each masked weight to exactly 0.

        Args:
            parameters: The parameters in which to do so; all of the model by default.
        """
        if parameters is None:
            self.shards.reshard()
            parameters = self._parameters.values()
        for name, parameter in self.named(parameters).items():
            self._zero_masked_(parameter, name)

    @torch.no_grad()
    def apply_to_average_(self, average: Average) -> None:
        """Set each masked weight to exactly 0 in an average, which may be on another device."""
        parameters = dict(average.module.named_parameters())
        for name in self._masks.keys() & average.names.keys():
            self._zero_masked_(parameters[average.names[name]], name)

    @torch.no_grad()
    def apply_to_grads_(self, parameters: Iterable[Tensor]) -> None:
        """Set the gradients of masked weights to 0, so that they count neither in clipping nor in momentum."""
        for name, parameter in self.named(parameters).items():
            if parameter.grad is not None:
                self._zero_masked_(parameter.grad, name)

    @torch.no_grad()
    def apply_to_state_(self, optimizer: Optimizer) -> None:
        """Set an optimizer's state of masked weights (momentum, second moments, directions) to 0."""
        for name, parameter in self.named(optimizer.state).items():
            for value in optimizer.state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    self._zero_masked_(value, name)
        for group in optimizer.param_groups:
            self._apply_to_flat_state_(group["params"], optimizer.state)

    def _apply_to_flat_state_(self, parameters: list[Tensor], state: Mapping[Tensor, Any]) -> None:
        """Set the state of masked weights to 0 in tensors that hold all parameters of a group, flattened.

        LBFGS keeps such tensors, all of them in the state of the first parameter.
        """
        sizes = [parameter.numel() for parameter in parameters]
        for value in tree_leaves(state.get(parameters[0], {})) if parameters else ():
            if torch.is_tensor(value) and value.shape == (sum(sizes),):
                for parameter, piece in zip(parameters, value.split(sizes), strict=True):
                    for name in self.named([parameter]):
                        self._zero_masked_(piece.view(parameter.shape), name)

    def _zero_masked_(self, tensor: Tensor, name: str) -> None:
        if tensor.is_sparse:  # the gradient of an embedding: of the rows that were looked up
            kept = self._masks[name].to(tensor.device)[tuple(tensor._indices())]
            tensor._values().masked_fill_(~kept, 0)
            return
        # Multiply the bits, as integers, by 0 or 1: faster than masked_fill_ and, unlike a product of floats,
        # 0 for inf and nan.
        bits = to_local(tensor).detach().view(_INTEGER[tensor.element_size()])
        mask = to_local(self._masks[name]).to(bits.device)
        for start, stop in row_ranges(len(bits), bits.numel(), bits.device):
            bits[start:stop].mul_(mask[start:stop])

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, packed 8 to the byte, with their shapes; tensors and plain values only.

        Masks that are divided among processes are gathered in the first process, one at a time; the state of
        the other processes has no bits for them.
        """
        state = {}
        for name, mask in self._masks.items():
            whole = self.shards.gather(to_local(mask), mask.shape) if is_sharded(mask) else mask
            state[name] = {"bits": pack(whole), "shape": list(mask.shape)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the masks to saved ones.

        A parameter without a mask gets one if any of its weights is masked in the state.

        Raises:
            ValueError: If a mask belongs to no parameter, or to one of another shape; nothing has changed then.
        """
        for name, mask in self.unpack_state(state).items():
            if name not in self._masks:
                if unpack(state[name]["bits"], tuple(state[name]["shape"])).all():
                    continue
                self._masks[name] = self._fresh(name)
            to_local(self._masks[name]).copy_(mask)

    def restore_(self, state: Mapping[str, Any]) -> None:
        """Set the masks to saved ones, and those of parameters that the state has no mask for to all True.

        Raises:
            ValueError: As :meth:`load_state_dict`; nothing has changed then.
        """
        self.load_state_dict(state)
        for name in self._masks.keys() - state.keys():
            to_local(self._masks[name]).fill_(True)

    def unpack_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return saved masks without setting them.

        Returns:
            Parameter name to a bool mask on the CPU; of parameters that are divided among processes, only the
            rows that this process holds.

        Raises:
            ValueError: If a mask belongs to no parameter, or to one of another shape.
        """
        found = {}
        for name, entry in state.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise ValueError(f"the state has a mask for {name!r}, which the model does not have.")
            shape = tuple(entry["shape"])
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"the state's mask for {name!r} has shape {shape}, the parameter {tuple(parameter.shape)}."
                )
            mask = unpack(entry["bits"], shape)
            found[name] = self.shards.own(mask) if is_sharded(parameter) else mask
        return found


def joined_masks(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return one mask for each parameter that has any, True where all of its masks keep the weight.

    Raises:
        ValueError: If a mask is no bool tensor, or belongs to no parameter, to one of another shape, to one
            that is divided among processes otherwise, or to one that does no plain arithmetic.
    """
    parameters = dict(model.named_parameters())
    joined: dict[str, Tensor] = {}
    for name, mask in chain.from_iterable(each.items() for each in _listed(masks)):
        if (why := _misfit(mask, parameters.get(name))) is not None:
            raise ValueError(f"masks[{name!r}] {why}.")
        joined[name] = mask & joined[name] if name in joined else mask
    return joined


def _listed(masks: Masks) -> Sequence[Mapping[str, Tensor]]:
    return [masks] if isinstance(masks, Mapping) else masks


def _misfit(mask: Any, parameter: nn.Parameter | None) -> str | None:
    """Return why a mask is none of a parameter; ``None`` if it is one."""
    if not torch.is_tensor(mask) or mask.dtype != torch.bool:
        found = mask.dtype if torch.is_tensor(mask) else type(mask).__name__
        return f"must be a bool tensor, not {found}"
    if parameter is None:
        return f"of shape {tuple(mask.shape)} fits no parameter"
    if mask.shape != parameter.shape:
        return (
            f"has shape {tuple(mask.shape)}, its parameter {tuple(parameter.shape)}; of a compacted model give"
            " the masks that are left, as callback.masks after a fit, or {}"
        )
    if is_sharded(mask) and not is_sharded(parameter):
        return (
            "is divided among processes, and its parameter is not: load the Pruner.state_dict() of the divided"
            " model into a Pruner of this one, and take its masks"
        )
    why = opaque(to_local(parameter))
    return None if why is None else f"belongs to a parameter that {why}"


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask 8 to the byte, lowest bit first, in row-major index order, whatever the memory layout.

    >>> pack(torch.tensor([True, False, True, False, False, False, False, False, True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    flat = mask.reshape(-1).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = flat[:, 0].clone()
    for bit in range(1, 8):
        packed |= flat[:, bit] << bit
    return packed.cpu()


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of a shape that :func:`pack` has packed.

    Raises:
        ValueError: If the bytes are not those of a mask of this shape.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), (3,))
    tensor([ True, False,  True])
    """
    size = torch.Size(shape).numel()
    if not torch.is_tensor(bits) or bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        raise ValueError(f"a mask of shape {tuple(shape)} needs {-(-size // 8)} packed bytes.")
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places & 1).view(-1)[:size].view(shape).bool()
