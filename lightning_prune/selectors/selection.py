"""Exact removal of the lowest-scoring units, over any number of groups: to a count, a level or a cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.radix import Boundary, bracket, find_boundary

# A cost is met to within _NEAR of the dense cost, if the removal of up to _TRIES single units achieves that.
_NEAR, _TRIES = 0.0025, 500
_FREE = 1e-9  # a cost, as a share of the dense one, that is none


def remove_lowest(candidates: Sequence[Candidates], count: int) -> None:
    """Remove the lowest-scoring units over all groups, until ``count`` units are removed in all.

    Units that earlier events have removed count. The count is exact; of equal scores the earlier unit stays. No
    group is emptied: it keeps its best units, as many as it must keep, and other units are removed instead as
    long as there are any. In groups whose width must be a multiple, the number of kept units is rounded to one
    afterwards.
    """
    possible = sum(each.size - each.group.least for each in candidates)
    rounded = [(each, each.kept.clone()) for each in candidates if each.group.multiple > 1]
    bound = list(candidates) if count > possible else []
    count = min(count, possible)
    if count > sum(each.removed for each in candidates):
        edge, emptied = _find_boundary(candidates, count)
        while emptied:
            for each in emptied:
                each.protect()
            bound += emptied
            edge, emptied = _find_boundary(candidates, count)
        stay = _ties_kept(candidates, edge.value, edge.below + edge.ties - count)
        for each, ties in zip(candidates, stay, strict=True):
            each.cut(edge.value, ties)
    for each in bound:
        each.protected = each.left == each.group.least
    for each, before in rounded:
        each.settle(before)


def _ties_kept(candidates: Sequence[Candidates], level: float, ties: int) -> list[int]:
    """Return how many of the units that score exactly ``level`` each group keeps in this process.

    Args:
        candidates: All groups.
        level: The score.
        ties: The number to keep over all groups and processes; the earliest are kept.
    """
    if not ties:
        return [0] * len(candidates)
    shards = candidates[0].shards
    here = torch.tensor([each.tied(level) for each in candidates])
    every = shards.add_up(here)
    earlier = every.cumsum(0) - every + shards.before(here)
    return (ties - earlier).clamp_min(0).minimum(here).tolist()


def _find_boundary(candidates: Sequence[Candidates], count: int) -> tuple[Boundary, list[Candidates]]:
    """Find the end of the ``count`` lowest scores, and the groups that their removal would empty.

    Usually one pass over the scores is enough: a sample gives a bracket, and units below it are removed
    immediately. This sweep is undone if the bracket turns out to be wrong or some group would be emptied.

    Returns:
        The boundary and the groups. If no group would be emptied and the bracket was right, the candidates are
        left swept, and :meth:`Candidates.cut` completes the removal.
    """
    sample = torch.cat([piece.flatten() for each in candidates for piece in each.sample()])
    shards = candidates[0].shards
    low, high = bracket(sample, count / sum(each.size for each in candidates), shards)
    emptied = list(candidates)
    try:
        swept = [each.sweep(low, high) for each in candidates]
        close = torch.cat([scores for _, scores in swept])
        here = torch.tensor([sum(gone for gone, _ in swept), len(close)])
        below, within = shards.add_up(here).tolist()
        if below < count <= below + within:
            found = find_boundary(lambda: [close], count - below, shards)
            edge = Boundary(found.value, below + found.below, found.ties)
        else:
            for each in candidates:
                each.restore()
            edge = find_boundary(
                lambda: (piece for each in candidates for piece in each.pieces()), count, shards
            )
        if edge.value == -math.inf:
            raise ValueError("a criterion must give finite scores; some are -inf.")
        emptied = [each for each in candidates if not each.survives(edge.value)]
    finally:
        if emptied:
            for each in candidates:
                each.restore()
    return edge, emptied


def remove_up_to(candidates: Candidates, level: float) -> None:
    """Remove the units that score at most a level; a group keeps its best units, as many as it must keep."""
    before = candidates.kept.clone() if candidates.group.multiple > 1 else None
    if not candidates.survives(level):
        candidates.protect()
        candidates.protected = True
    candidates.cut(level)
    if before is not None:
        candidates.settle(before)


def remove_to_cost(candidates: Sequence[Candidates], cost: Callable[[], float], goal: float) -> None:
    """Remove the lowest-scoring units until a cost is met as nearly as whole units allow.

    Args:
        candidates: All groups.
        cost: Returns the cost of the units that the candidates keep at present, as a share of the dense cost.
            It falls as units are removed.
        goal: The share to meet.
    """
    before = [each.kept.clone() for each in candidates]

    def cost_without(count: int) -> float:
        for each, kept in zip(candidates, before, strict=True):
            each.restart(kept)
        remove_lowest(candidates, count)
        return cost()

    few = sum(each.removed for each in candidates)
    many = sum(each.size - each.group.least for each in candidates)
    cost_few, cost_many = cost_without(few), cost_without(many)
    halve = False
    while many - few > 1:
        # The cost is nearly linear in the count; where it is not, bisection at every other step helps.
        guess = few + (many - few) * (cost_few - goal) / max(cost_few - cost_many, 1e-12)
        count = (few + many) // 2 if halve else min(max(round(guess), few + 1), many - 1)
        now = cost_without(count)
        if now > goal:
            few, cost_few = count, now
        else:
            many, cost_many = count, now
        halve = not halve
    cost_without(few)
    if min(cost_few - goal, goal - cost_many) > _NEAR:
        _remove_singly(candidates, cost, goal)
    if abs(cost() - goal) > abs(cost_many - goal):
        cost_without(many)


def give_back(candidates: Sequence[Candidates], before: Sequence[Tensor], cost: Callable[[], float]) -> None:
    """Keep more of the units that were to go, the best ones, in groups where that costs nothing.

    Args:
        candidates: All groups.
        before: The units that each kept before the selection.
        cost: Returns the cost of the units that the candidates keep at present; it falls as units are removed.
    """
    most = cost() + _FREE
    for each, kept in zip(candidates, before, strict=True):
        least = each.left
        widths = [width for width in range(least, int(kept.count_nonzero()) + 1) if each.group.allows(width)]

        def costs_more(width: int, each: Candidates = each, kept: Tensor = kept) -> bool:
            each.resize(kept, width)
            return cost() > most

        found = bisect_left(widths, True, key=costs_more)
        each.resize(kept, widths[found - 1] if found else least)


def _remove_singly(candidates: Sequence[Candidates], cost: Callable[[], float], goal: float) -> None:
    """Remove single units, or as many of a group as its widths are multiples of, the lowest first.

    Those whose removal would lower the cost too far are skipped.
    """
    steps = sorted(
        (score, group, units) for group, each in enumerate(candidates) for score, units in _steps(each)
    )
    for _, group, units in steps[:_TRIES]:
        each = candidates[group]
        if each.left - len(units) >= each.group.least:
            places = torch.unravel_index(torch.tensor(units, device=each.kept.device), each.group.shape)
            each.kept[places] = False
            each.kept[places] = cost() < goal - _NEAR
        if cost() <= goal + _NEAR:
            return


def _steps(candidates: Candidates) -> list[tuple[float, list[int]]]:
    """Return the lowest of the kept units in the numbers in which they may go: their mean score and places."""
    width = candidates.group.multiple
    if candidates.left % width:  # all are kept, and are no multiple
        return []
    kept = candidates.kept.flatten().nonzero().flatten()
    scores, order = candidates.scores().flatten()[kept].sort(stable=True)
    most = _TRIES * width
    pairs = zip(scores[:most].split(width), kept[order[:most]].split(width), strict=True)
    return [(float(part.mean()), units.tolist()) for part, units in pairs]
