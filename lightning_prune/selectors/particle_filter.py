"""Whole masks scored by the loss they leave: a population of them, resampled and disturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.core.parts import check_counts, check_flag, check_part, check_seed, is_number
from lightning_prune.selectors.base import Costs, Selector
from lightning_prune.selectors.by_score import Global
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup, Units


@dataclass(frozen=True, repr=False)
class ParticleFilter(Selector):
    """Keeps, of a population of masks, the one with the least loss on held training batches.

    Each particle is the criterion's scores times random numbers, and its mask what another selector makes of
    them, so that target, budget and pattern hold for all. The first is the criterion's own choice, so that the
    result is never worse on the held batches. In each round particles are drawn anew, likelier the lower their
    loss, and disturbed; the best stays as it is. Anwar, Hwang and Sung 2015, "Structured Pruning of Deep
    Convolutional Neural Networks", arXiv 1512.08571, who weigh by misclassification; scores as particles, the
    weights ``exp(-loss / deviation)`` and the numbers are ours.

    Args:
        selector: Makes a mask of scores.
        population: Number of particles.
        rounds: How many times they are tried.
        spread: Standard deviation of the random numbers' logarithm, added in each round.
        evolutionary: Whether each particle is a cross of two, unit by unit, before it is disturbed.
        batches: How many training batches are held to try them on.
        seed: Of all draws.

    Raises:
        ValueError: If a number is out of range, or ``selector`` is none.
    """

    selector: Selector = Global()
    population: int = 16
    rounds: int = 8
    spread: float = 0.3
    evolutionary: bool = False
    batches: int = 4
    seed: int = 0

    needs = Needs.LOSS

    def __post_init__(self) -> None:
        check_part(self.selector, Selector, "selector")
        if Needs.LOSS in self.selector.needs:
            raise ValueError(f"selector={self.selector!r} must be one that goes by scores.")
        check_counts(population=self.population, rounds=self.rounds, batches=self.batches)
        check_seed(self.seed)
        check_flag(evolutionary=self.evolutionary)
        if not is_number(self.spread) or self.spread <= 0:
            raise ValueError(f"spread={self.spread!r} must be a finite number above 0.")

    @property
    def held(self) -> int:
        """As many as are asked for."""
        return self.batches

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """One for each particle, round and batch."""
        return self.population * self.rounds * self.batches

    @property
    def needs_example(self) -> bool:
        """Whether the selector does."""
        return self.selector.needs_example

    def resolve(self, target: float | None) -> float:
        """As the selector does."""
        return self.selector.resolve(target)

    def check(self, share: float, units: Units) -> None:
        """As the selector does."""
        self.selector.check(share, units)

    def refuses(self, group: UnitGroup) -> str | None:
        """What the selector refuses."""
        return self.selector.refuses(group)

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Removes what the best particle does without."""
        before = [each.kept.clone() for each in candidates]

        def put(particle: Sequence[Tensor]) -> None:
            for each, kept, noise in zip(candidates, before, particle, strict=True):
                each.restart(kept)
                each.disturb(noise.exp().to(kept.device))
            self.selector.select(candidates, fraction, costs)

        def loss(particle: Sequence[Tensor]) -> float:
            put(particle)
            return costs("loss")

        try:
            self._search(candidates, put, loss)
        except BaseException:  # masks are live, and what was tried last is no choice
            for each, kept in zip(candidates, before, strict=True):
                each.restart(kept)
            raise

    def _search(
        self,
        candidates: Sequence[Candidates],
        put: Callable[[Sequence[Tensor]], None],
        loss: Callable[[Sequence[Tensor]], float],
    ) -> None:
        draws = torch.Generator().manual_seed(self.seed)
        own = [torch.zeros(each.group.shape) for each in candidates]
        particles = [own, *(self._disturbed(own, draws) for _ in range(1, self.population))]
        for _ in range(self.rounds):
            losses = torch.tensor([loss(particle) for particle in particles], dtype=torch.float64)
            losses = losses.nan_to_num(nan=math.inf)
            best = particles[int(losses.argmin())]
            particles = [best, *self._drawn(particles, losses, draws)]
        put(best)

    def _drawn(
        self, particles: Sequence[list[Tensor]], losses: Tensor, draws: torch.Generator
    ) -> list[list[Tensor]]:
        """The next population, but for the best: likelier ones more often, each disturbed."""
        known = losses[losses.isfinite()]
        if not len(known):
            losses = known = torch.zeros_like(losses)
        likely = torch.softmax((known.min() - losses) / known.std(correction=0).clamp_min(1e-12), 0)

        def draw() -> list[list[Tensor]]:
            chosen = torch.multinomial(likely, self.population, replacement=True, generator=draws)
            return [particles[index] for index in chosen[1:]]

        drawn = draw()
        if self.evolutionary:
            drawn = [_crossed(one, other, draws) for one, other in zip(drawn, draw(), strict=True)]
        return [self._disturbed(particle, draws) for particle in drawn]

    def _disturbed(self, particle: Sequence[Tensor], draws: torch.Generator) -> list[Tensor]:
        return [noise + self.spread * torch.randn(noise.shape, generator=draws) for noise in particle]


def _crossed(one: Sequence[Tensor], other: Sequence[Tensor], draws: torch.Generator) -> list[Tensor]:
    """Each unit's number from one parent or the other."""
    return [
        torch.where(torch.rand(left.shape, generator=draws) < 0.5, left, right)
        for left, right in zip(one, other, strict=True)
    ]
