"""Parts that slices take of one dimension: whether they are of equal size shows when all are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from lightning_prune.channels.graph.labels import Labels

_Bounds: TypeAlias = tuple[int, int]  # where a part begins and ends
_Taken: TypeAlias = dict[_Bounds, list[str]]  # the modules that take each part


class SlicedParts:
    """Collects the parts that slices take in one pass, and couples the labels of those of equal size."""

    def __init__(self) -> None:
        self._taken: dict[tuple[object, ...], tuple[Tensor, int, _Taken]] = {}

    def note(self, field: Tensor, dim: int, bounds: _Bounds, place: str) -> None:
        """Record that a slice takes a part.

        Args:
            field: The labels of what is sliced.
            dim: The dimension.
            bounds: Where the part begins and ends.
            place: Name of the module that runs.
        """
        # fields are kept, so that no other one gets the same memory
        key = (field.data_ptr(), field.shape, field.stride(), dim)
        self._taken.setdefault(key, (field, dim, {}))[2].setdefault(bounds, []).append(place)

    def couple(self, labels: Labels) -> list[tuple[Tensor, str]]:
        """Couple the labels of parts of equal size, so that each keeps the same indices.

        Where the parts fill a dimension, those of one size are coupled. Otherwise a part is taken to be one of
        several of equal size if these would fill it, and it is a half or not the first.

        Args:
            labels: The labels that the fields contain.

        Returns:
            The labels of the other parts, whose units are of groups of their own, once for each module that
            takes a part of the same dimension: its numbers may say where this part ends.
        """
        apart: list[tuple[Tensor, str]] = []
        for field, dim, taken in self._taken.values():
            whole = field.shape[dim]
            filled = _fill(taken, whole)
            if filled:
                modules = list(dict.fromkeys(place for places in taken.values() for place in places))
                labels.place = modules[0]
                alike = couple_alike(labels, field, dim, taken)
                apart += [(part, place) for place in modules for part in alike.values()]
            for (start, end), places in () if filled else taken.items():
                labels.place = places[0]
                if _is_a_share(whole, start, end - start):
                    couple_alike(labels, field, dim, pairwise(range(0, whole + 1, end - start)))
                else:
                    parts = field.split([start, end - start, whole - end], dim)
                    apart += [(part, place) for place in places for part in parts if part.numel()]
        return apart


def couple_alike(
    labels: Labels, field: Tensor, dim: int, bounds: Iterable[_Bounds]
) -> Mapping[_Bounds, Tensor]:
    """Couple the labels of parts of one size, so that each keeps the same indices.

    Args:
        labels: The labels that the field contains.
        field: The labels of what is in parts.
        dim: The dimension along which it is.
        bounds: Where each part begins and ends.

    Returns:
        The labels of each part if there are several sizes, whose units are of different groups; otherwise none.
    """
    parts = {each: field.narrow(dim, each[0], each[1] - each[0]) for each in bounds}
    firsts: dict[int, Tensor] = {}
    for part in parts.values():
        labels.couple(firsts.setdefault(part.shape[dim], part), part)
    return parts if len(firsts) > 1 else {}


def _fill(taken: Iterable[_Bounds], whole: int) -> bool:
    """Return whether several parts fill a dimension, one after the other."""
    bounds = sorted(taken)
    inner = all(end == start for (_, end), (start, _) in pairwise(bounds))
    return len(bounds) > 1 and inner and (bounds[0][0], bounds[-1][1]) == (0, whole)


def _is_a_share(whole: int, start: int, length: int) -> bool:
    """Return whether a part is taken to be one of several of equal size: a half, or one that is not the first.

    A single element is not: code that takes one by its number takes no others of its kind.
    """
    shares = whole % length == 0 and start % length == 0
    return shares and length > 1 and (start > 0 or 2 * length == whole)
