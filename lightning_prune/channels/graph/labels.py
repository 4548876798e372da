"""Labels: integers for what is cut together. Union-find, with a reason for each that must stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Labels:
    """Integers that can be coupled and frozen. 0 stands for elements that no label covers: never cut.

    >>> labels = Labels()
    >>> left, right = labels.new(3), labels.new(3)
    >>> labels.couple(left, right)
    >>> labels.freeze(right[:1], "the network's output")
    >>> labels.find(right).tolist()
    [1, 2, 3]
    >>> labels.reasons()
    {1: "the network's output"}
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._frozen: list[tuple[Tensor, str]] = []
        self._lenient = False

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Tensor:
        """That many labels of their own."""
        start = len(self._parent)
        fresh = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, fresh])
        return fresh

    def find(self, labels: Tensor) -> Tensor:
        """For each label the least one that it is coupled with."""
        while True:
            parents = self._parent[labels]
            if torch.equal(parents, labels):
                return labels
            labels = parents

    def couple(self, left: Tensor, right: Tensor, why: str = "meets elements that nothing cuts") -> None:
        """Makes labels that stand at the same place, after broadcasting, one.

        Args:
            left: Labels.
            right: Labels.
            why: The reason to freeze a label that stands where the other side has none.
        """
        shape = torch.broadcast_shapes(left.shape, right.shape)
        pairs = torch.stack([side.expand(shape).reshape(-1) for side in (left, right)])
        pairs = torch.unique(pairs, dim=1)
        alone = (pairs == 0).any(0)
        self.freeze(pairs[:, alone], why)
        pairs = pairs[:, ~alone]
        while True:
            low, high = self.find(pairs).sort(0).values
            apart = low != high
            if not apart.any():
                return
            # a parent may be wanted by several: the least has it, the others come round again
            self._parent.scatter_reduce_(0, high[apart], low[apart], "amin")

    def freeze(self, labels: Tensor, why: str) -> None:
        """Keeps these, and all that are or will be coupled with them."""
        if self._lenient:
            return
        labels = torch.unique(labels)
        labels = labels[labels != 0]
        if len(labels):
            self._frozen.append((labels, why))

    @contextmanager
    def lenient(self, yes: bool) -> Iterator[None]:
        """Freezes nothing meanwhile."""
        before, self._lenient = self._lenient, yes
        try:
            yield
        finally:
            self._lenient = before

    def reasons(self) -> dict[int, str]:
        """The least label of each frozen set, to the first reason that was given."""
        found: dict[int, str] = {}
        for labels, why in self._frozen:
            for label in torch.unique(self.find(labels)).tolist():
                found.setdefault(label, why)
        return found
