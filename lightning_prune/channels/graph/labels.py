"""Integer labels of channels: union-find over labels that are pruned together, and reasons to freeze them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NOT_CUT = "is combined with values that cannot shrink with it, such as an input or a constant"


class Labels:
    """Integers that can be coupled (pruned together) and frozen (never pruned).

    0 is the label of elements that have none of their own, and are never pruned.

    Attributes:
        place: Name of the module that runs, which is added to reasons; "" if none does, or the whole model.
        lenient: Whether ``freeze`` does nothing, as for ops that no result depends on.

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
        self.lenient = False
        self.place = ""

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Tensor:
        """Return ``count`` new labels, coupled with no other."""
        start = len(self._parent)
        fresh = torch.arange(start, start + count)
        self._parent = torch.cat([self._parent, fresh])
        return fresh

    def find(self, labels: Tensor) -> Tensor:
        """Return for each label the least one that it is coupled with: the root of its set."""
        while True:
            parents = self._parent[labels]
            if torch.equal(parents, labels):
                return labels
            labels = parents

    def couple(self, left: Tensor, right: Tensor, why: str = NOT_CUT) -> None:
        """Couple the labels that two tensors have at the same index, after broadcasting.

        Args:
            left: Labels.
            right: Labels, of a shape that broadcasts with that of ``left``.
            why: The reason to freeze a label that meets the label 0.
        """
        left, right = torch.broadcast_tensors(self.find(left), self.find(right))
        apart = left != right
        if not apart.any():
            return
        # each pair once, as one number; a sort of pairs takes many times as long
        count = len(self._parent)
        codes = torch.unique(left[apart] * count + right[apart])
        pairs = torch.stack([codes // count, codes % count])
        alone = (pairs == 0).any(0)
        self.freeze(pairs[:, alone], why)
        pairs = pairs[:, ~alone]
        while True:
            low, high = self.find(pairs).sort(0).values
            apart = low != high
            if not apart.any():
                return
            # of several new parents a root gets the least; the next iteration couples the others
            self._parent.scatter_reduce_(0, high[apart], low[apart], "amin")

    def freeze(self, labels: Tensor, why: str) -> None:
        """Freeze these labels, and all that are or will be coupled with them, for the reason ``why``."""
        if self.lenient:
            return
        labels = torch.unique(labels)
        labels = labels[labels != 0]
        if len(labels):
            self._frozen.append((labels, f"{why} (in {self.place})" if self.place else why))

    @contextmanager
    def without_freezing(self, yes: bool) -> Iterator[None]:
        """Return a context in which ``freeze`` does nothing if ``yes``, and works as usual otherwise."""
        before, self.lenient = self.lenient, yes
        try:
            yield
        finally:
            self.lenient = before

    def reasons(self) -> dict[int, str]:
        """Return the least label of each frozen set of coupled labels, with the first reason given for it."""
        found: dict[int, str] = {}
        for labels, why in self._frozen:
            for label in torch.unique(self.find(labels)).tolist():
                found.setdefault(label, why)
        return found
