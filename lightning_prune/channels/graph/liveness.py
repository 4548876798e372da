"""What a pass runs, and which of it has a part in what it gives."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.channels.graph.calls import argument_of

OpRecord: TypeAlias = tuple[Any, tuple[torch.Size, ...]]
_Memory: TypeAlias = frozenset[StorageWeakRef]


class OpRecorder(TorchDispatchMode):
    """Notes each op that runs.

    Attributes:
        steps: Of each the op and the shapes that it gave.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[OpRecord] = []
        self._traffic: list[tuple[_Memory, _Memory]] = []  # what each reads, what it writes

    def live(self, wanted: Any) -> list[bool]:
        """For each op whether what it made may have come into the tensors that are wanted."""
        memory = set(_storages(wanted))
        found = []
        for reads, writes in reversed(self._traffic):
            found.append(not memory.isdisjoint(writes))
            if found[-1]:
                memory |= reads
        return found[::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and notes it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.steps.append(op_record(func, result))
        changed = [
            argument_of(func, args, kwargs, argument.name)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._traffic.append((_storages((args, kwargs)), _storages((result, changed))))
        return result


def op_record(func: Any, result: Any) -> OpRecord:
    """What a tape keeps of an op."""
    return func, tuple(leaf.shape for leaf in tree_leaves(result) if torch.is_tensor(leaf))


def _storages(tree: Any) -> _Memory:
    """The memory that tensors lie in; the references keep its address from being used again."""
    tensors = (leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf))
    return frozenset(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
