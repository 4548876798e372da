"""The exact removal of what scores lowest, over any number of groups: to a count, a level or a cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lightning_prune.selectors.candidates import Candidates
from lightning_prune.selectors.radix import Boundary, bracket, find_boundary

_NEAR, _TRIES = 0.0025, 500  # a cost is met to this share of the dense one, if so many units can help


def remove_lowest(candidates: Sequence[Candidates], count: int) -> None:
    """Removes the ``count`` units that score lowest over all groups; what is gone already counts.

    Exact: ties keep the earlier unit. No group is emptied: it keeps its best unit, or as many as have to stay,
    and others go instead as long as there are any. Where widths are multiples, each is rounded in the end.
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
    """How many of its units here that score just ``level`` each group keeps: ``ties`` in all, the earliest."""
    if not ties:
        return [0] * len(candidates)
    shards = candidates[0].shards
    here = torch.tensor([each.tied(level) for each in candidates])
    every = shards.add_up(here)
    earlier = every.cumsum(0) - every + shards.before(here)
    return (ties - earlier).clamp_min(0).minimum(here).tolist()


def _find_boundary(candidates: Sequence[Candidates], count: int) -> tuple[Boundary, list[Candidates]]:
    """Where the ``count`` lowest scores end, and which groups that would empty.

    As a rule one look at each score is enough: a sample suggests a bracket, and what is below is removed at
    once. That is taken back where the bracket proves wrong, or some group would be emptied.
    """
    sample = torch.cat([piece.flatten() for each in candidates for piece in each.sample()])
    shards = candidates[0].shards
    low, high = bracket(sample, count / sum(each.size for each in candidates), shards)
    emptied: list[Candidates] = list(candidates)
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
    """Removes what scores up to a level; a group that would be emptied keeps the best that have to stay."""
    before = candidates.kept.clone() if candidates.group.multiple > 1 else None
    if not candidates.survives(level):
        candidates.protect()
        candidates.protected = True
    candidates.cut(level)
    if before is not None:
        candidates.settle(before)


def remove_to_cost(candidates: Sequence[Candidates], cost: Callable[[], float], goal: float) -> None:
    """Removes the lowest units until a cost is met as nearly as units allow.

    Args:
        candidates: All groups.
        cost: Gives what is left with what they keep at present; falls as units go.
        goal: The cost to meet.
    """
    before = [each.kept.clone() for each in candidates]

    def cost_without(count: int) -> float:
        for each, kept in zip(candidates, before, strict=True):
            each.restart(kept)
        remove_lowest(candidates, count)
        return cost()

    few = sum(each.removed for each in candidates)
    many = sum(each.size - each.group.least for each in candidates)
    dear, cheap = cost_without(few), cost_without(many)
    halve = False
    while many - few > 1:
        # costs are nearly straight in the count, and where they are not, halving every other time helps
        guess = few + (many - few) * (dear - goal) / max(dear - cheap, 1e-12)
        count = (few + many) // 2 if halve else min(max(round(guess), few + 1), many - 1)
        now = cost_without(count)
        few, many, dear, cheap = (count, many, now, cheap) if now > goal else (few, count, dear, now)
        halve = not halve
    cost_without(few)
    if min(dear - goal, goal - cheap) > _NEAR:
        _remove_singly(candidates, cost, goal)
    if abs(cost() - goal) > abs(cheap - goal):
        cost_without(many)


def _remove_singly(candidates: Sequence[Candidates], cost: Callable[[], float], goal: float) -> None:
    """Removes single units, the lowest first, that do not cost too much: the next in line did."""
    free = [each for each in candidates if each.group.multiple == 1]
    lowest = sorted(
        (score, group, unit)
        for group, each in enumerate(free)
        for unit, score in enumerate(each.scores().flatten().tolist())
        if score > -math.inf
    )
    for _, group, unit in lowest[:_TRIES]:
        each = free[group]
        if int(each.kept.count_nonzero()) > each.group.least:
            place = torch.unravel_index(torch.tensor(unit, device=each.kept.device), each.group.shape)
            each.kept[place] = False
            each.kept[place] = cost() < goal - _NEAR
        if cost() <= goal + _NEAR:
            return
