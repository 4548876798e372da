"""Exchange between processes that hold different rows of the same tensors, as ``fully_shard`` divides them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


class Shards(ABC):
    """The processes among which the rows of tensors are divided: the first holds the first rows, and so on.

    Every method that communicates is a collective: all processes have to call it, for the same tensors in the
    same order.

    Args:
        rank: Rank of this process among them.
        size: Number of processes.

    Attributes:
        sharded: Whether rows may be divided among several processes.
    """

    sharded: ClassVar[bool] = True

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @abstractmethod
    def add_up(self, numbers: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""

    @abstractmethod
    def maximum(self, numbers: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes; nan counts as inf."""

    @abstractmethod
    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Gather a whole tensor in the first process.

        Args:
            rows: The rows that this process holds.
            shape: Shape of the whole tensor.

        Returns:
            In the first process the whole tensor, on the CPU if rows came from other processes; in the other
            processes a tensor without rows.
        """

    @abstractmethod
    def reshard(self) -> None:
        """Free parameters that were gathered for a forward pass without a backward pass, as in validation.

        While they are gathered, they hide the rows that this process holds, and what is written to these rows.
        """

    @abstractmethod
    def own(self, whole: Tensor) -> Tensor:
        """Return the rows of a whole tensor that belong to this process."""

    def before(self, numbers: Tensor) -> Tensor:
        """Return the elementwise sum over the processes that hold earlier rows."""
        return self._table(numbers)[: self.rank].sum(0)

    def has_first_maximum(self, number: Tensor) -> bool:
        """Return whether this process has the highest number, and no process with earlier rows has the same."""
        return int(self._table(number).argmax()) == self.rank

    def _table(self, numbers: Tensor) -> Tensor:
        table = numbers.new_zeros(self.size, *numbers.shape)
        table[self.rank] = numbers
        return self.add_up(table)


class Unsharded(Shards):
    """A single process, which holds all rows."""

    sharded = False

    def __init__(self) -> None:
        super().__init__(0, 1)

    def add_up(self, numbers: Tensor) -> Tensor:
        """Return the numbers unchanged."""
        return numbers

    def maximum(self, numbers: Tensor) -> Tensor:
        """Return the numbers unchanged."""
        return numbers

    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return the rows, which are the whole tensor."""
        return rows

    def own(self, whole: Tensor) -> Tensor:
        """Return the whole tensor."""
        return whole

    def reshard(self) -> None:
        """Do nothing, since nothing is gathered."""


class RowSharded(Shards):
    """Processes among which rows are divided as ``fully_shard`` does it.

    Args:
        group: The process group.
        device: Device for the tensors that are exchanged.
        modules: The modules that gather parameters for a forward pass.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, modules: Sequence[FSDPModule] = ()
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._device = device
        self._modules = modules

    def add_up(self, numbers: Tensor) -> Tensor:
        """Return the sum, by an all-reduce."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def maximum(self, numbers: Tensor) -> Tensor:
        """Return the maximum, by an all-reduce."""
        known = numbers.where(~numbers.isnan(), torch.inf) if numbers.is_floating_point() else numbers
        return self._reduced(known, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        result = numbers.to(self._device, copy=True).contiguous()
        dist.all_reduce(result, by, self._group)
        return result.to(numbers.device)

    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Gather the same number of rows from each process, and drop the padding from the end."""
        most = -(-shape[0] // self.size)
        sent = torch.zeros(most, *shape[1:], dtype=rows.dtype, device=self._device)
        sent[: len(rows)] = rows
        data = sent.flatten().view(torch.uint8)  # not every backend can send bools
        parts = [torch.empty_like(data) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(data, parts, dist.get_global_rank(self._group, 0), self._group)
        if parts is None:
            return rows[:0]
        return torch.cat([part.cpu() for part in parts]).view(rows.dtype).view(-1, *shape[1:])[: shape[0]]

    def own(self, whole: Tensor) -> Tensor:
        """Return a copy of the rows, so that the whole tensor can be freed."""
        most = -(-len(whole) // self.size)
        return whole[most * self.rank : most * (self.rank + 1)].clone()

    def reshard(self) -> None:
        """Reshard all modules, as after a backward pass."""
        for module in self._modules:
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether other processes hold other rows of the tensor."""
    return isinstance(tensor, DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds, or all of it if it is not divided; not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(rows: Tensor, whole: Tensor) -> Tensor:
    """Return rows of this process as a tensor that is divided like another one; a view of the rows.

    Args:
        rows: As many rows as :func:`to_local` returns of ``whole``.
        whole: A tensor of the shape of the result. If it is not divided, ``rows`` is returned.
    """
    if not isinstance(whole, DTensor):
        return rows
    return DTensor.from_local(
        rows, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
    )


def shards_of(model: nn.Module) -> Shards:
    """Return the processes among which the parameters of a model are divided.

    Raises:
        ValueError: If parameters are divided otherwise than along their first dimension, over one dimension of
            one device mesh.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.reshard()
    divided = {name: each for name, each in model.named_parameters() if isinstance(each, DTensor)}
    if not divided:
        return Unsharded()
    first = next(iter(divided.values()))
    for name, parameter in divided.items():
        if parameter.placements != (Shard(0),) or parameter.device_mesh != first.device_mesh:
            raise ValueError(
                f"parameter {name!r} is divided as {tuple(parameter.placements)} over {parameter.device_mesh}:"
                " pruning needs all parameters divided along their first dimension, over one dimension of one"
                " device mesh, as fully_shard does it, without tensor parallelism or replicas."
            )
    mesh = first.device_mesh
    return RowSharded(mesh.get_group(), torch.device(mesh.device_type), modules)


_GATHER = (
    "save a checkpoint in one file, and load it in one process; masks go along in Pruner.state_dict(), which"
    " gathers them, or with `lightning-prune export`"
)
LOAD_FIRST = "load into the whole model, and divide it then"


def check_unsharded(model: nn.Module, who: str, instead: str = _GATHER) -> None:
    """Raise ValueError if the parameters of a model are divided among processes.

    Args:
        model: The model.
        who: Name of the function that needs whole parameters, for the error message.
        instead: What the user can do, for the error message.
    """
    if shards_of(model).sharded:
        raise ValueError(
            f"{who} needs whole parameters, but processes divide those of this {type(model).__name__}:"
            f" {instead}."
        )
