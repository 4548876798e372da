"""Who holds the other rows of tensors that lie in several processes, and what all of them come to."""

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

    What is asked here is asked of all of them: each has to ask, for the same things in the same order.

    Args:
        rank: Number of this process among them.
        size: How many there are.

    Attributes:
        sharded: Whether some rows may lie elsewhere.
    """

    sharded: ClassVar[bool] = True

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @abstractmethod
    def add_up(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, number by number."""

    @abstractmethod
    def highest(self, numbers: Tensor) -> Tensor:
        """The highest of all processes, number by number; nan counts as inf."""

    @abstractmethod
    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Brings a tensor together, in the first process alone.

        Args:
            rows: Those that are held here.
            shape: Of the whole tensor.

        Returns:
            The whole tensor, on the CPU where rows came from elsewhere; in the other processes no rows.
        """

    @abstractmethod
    def reshard(self) -> None:
        """Lets go of parameters that were brought together for a pass without a way back, as in validation.

        They would hide the rows that are held here, and what is written into these.
        """

    @abstractmethod
    def own(self, whole: Tensor) -> Tensor:
        """The rows that belong here, of a whole tensor."""

    def before(self, numbers: Tensor) -> Tensor:
        """The sum over the processes that hold earlier rows, number by number."""
        return self._table(numbers)[: self.rank].sum(0)

    def leads(self, number: Tensor) -> bool:
        """Whether this process has the highest number of all, and none with earlier rows has the same."""
        return int(self._table(number).argmax()) == self.rank

    def _table(self, numbers: Tensor) -> Tensor:
        table = numbers.new_zeros(self.size, *numbers.shape)
        table[self.rank] = numbers
        return self.add_up(table)


class Unsharded(Shards):
    """One process holds all rows."""

    sharded = False

    def __init__(self) -> None:
        super().__init__(0, 1)

    def add_up(self, numbers: Tensor) -> Tensor:
        """They are the sum."""
        return numbers

    def highest(self, numbers: Tensor) -> Tensor:
        """They are the highest."""
        return numbers

    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """All are here."""
        return rows

    def own(self, whole: Tensor) -> Tensor:
        """All of it."""
        return whole

    def reshard(self) -> None:
        """Nothing was brought together."""


class RowSharded(Shards):
    """Rows are divided as ``fully_shard`` does it.

    Args:
        group: The processes.
        device: Where they exchange numbers.
        modules: What brings parameters together for a pass.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, modules: Sequence[FSDPModule] = ()
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._device = device
        self._modules = modules

    def add_up(self, numbers: Tensor) -> Tensor:
        """By an all-reduce."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def highest(self, numbers: Tensor) -> Tensor:
        """By an all-reduce."""
        known = numbers.where(~numbers.isnan(), torch.inf) if numbers.is_floating_point() else numbers
        return self._reduced(known, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        result = numbers.to(self._device, copy=True).contiguous()
        dist.all_reduce(result, by, self._group)
        return result.to(numbers.device)

    def gather(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """All send as many rows, of which the last ones may stand for nothing."""
        most = -(-shape[0] // self.size)
        sent = torch.zeros(most, *shape[1:], dtype=rows.dtype, device=self._device)
        sent[: len(rows)] = rows
        data = sent.flatten().view(torch.uint8)  # not every backend moves bools
        parts = [torch.empty_like(data) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(data, parts, dist.get_global_rank(self._group, 0), self._group)
        if parts is None:
            return rows[:0]
        return torch.cat([part.cpu() for part in parts]).view(rows.dtype).view(-1, *shape[1:])[: shape[0]]

    def own(self, whole: Tensor) -> Tensor:
        """A copy: the whole is not kept in memory for it."""
        most = -(-len(whole) // self.size)
        return whole[most * self.rank : most * (self.rank + 1)].clone()

    def reshard(self) -> None:
        """As after a way back."""
        for module in self._modules:
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other rows of it."""
    return isinstance(tensor, DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, not a copy: its rows, or all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(rows: Tensor, whole: Tensor) -> Tensor:
    """The tensor that has these rows here, divided as another of its shape is: a view of them.

    Args:
        rows: As many as :func:`local` gives of ``whole``.
        whole: The other tensor.
    """
    if not isinstance(whole, DTensor):
        return rows
    return DTensor.from_local(
        rows, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride()
    )


def shards_of(model: nn.Module) -> Shards:
    """Who holds the other rows of a model's parameters.

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


def check_unsharded(model: nn.Module, who: str) -> None:
    """Raises ValueError if processes divide a model's parameters, for what cannot work on parts of them."""
    if shards_of(model).sharded:
        raise ValueError(
            f"{who} needs whole parameters, but processes divide those of this {type(model).__name__}: save a"
            " checkpoint in one file, and load it in one process."
        )
