"""Records the ops that a pass runs, and finds those that its results depend on."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.channels.graph.calls import argument_of, tensor_leaves

OpRecord: TypeAlias = tuple[Any, tuple[torch.Size, ...]]
_Memory: TypeAlias = frozenset[StorageWeakRef]


class OpRecorder(TorchDispatchMode):
    """Dispatch mode that records each op that runs.

    Attributes:
        steps: For each op, in order, the op and the shapes of its outputs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[OpRecord] = []
        # for each op, the memory that it reads and the memory that it writes
        self._traffic: list[tuple[_Memory, _Memory]] = []

    def live(self, wanted: Any) -> list[bool]:
        """Return for each op whether the wanted tensors may depend on its outputs.

        Args:
            wanted: Any nesting of tensors, as they are after the pass.
        """
        memory = set(_storages(wanted))
        found = []
        for reads, writes in reversed(self._traffic):
            found.append(not memory.isdisjoint(writes))
            if found[-1]:
                memory |= reads
        return found[::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and record it."""
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
    """Return the record of one op: the op and the shapes of the tensors that it returned."""
    return func, tuple(tensor.shape for tensor in tensor_leaves(result))


def _storages(tree: Any) -> _Memory:
    """Return weak references to the storages of tensors, which keep their addresses from being reused."""
    return frozenset(StorageWeakRef(tensor.untyped_storage()) for tensor in tensor_leaves(tree))
