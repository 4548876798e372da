"""A selector that searches for masks by their loss: a population of masks, resampled and perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.core.parts import check_counts, check_flag, check_part, check_seed, is_number
from lightning_prune.selectors.base import Costs, Selector
from lightning_prune.selectors.by_score import Global
from lightning_prune.selectors.candidates import Candidates
from lightning_prune.statistics.observer import Needs
from lightning_prune.units.groups import UnitGroup, Units


@dataclass(frozen=True, repr=False)
class ParticleFilter(Selector):
    """Keeps the mask with the least loss on the calibration batches, out of a population of masks.

    Each particle consists of one random factor per unit for the criterion's scores. Its mask is the choice of
    another selector from the scores times the factors, so that target, budget and pattern hold for all
    particles. The first particle has factors of 1: the mask is the choice from the criterion's own scores, so
    that the result is never worse than that on the calibration batches. In each round particles are resampled,
    with a higher probability the lower their loss, and perturbed; the best one stays as it is. Anwar, Hwang and
    Sung 2015, "Structured Pruning of Deep Convolutional Neural Networks", arXiv 1512.08571, who weigh particles
    by misclassification; scores as particles, the weights ``exp(-loss / deviation)`` and the default numbers
    are ours.

    Args:
        selector: Chooses the mask, given the scores.
        population: Number of particles.
        rounds: Number of rounds; each evaluates all particles.
        spread: Standard deviation of the normal noise that each round adds to the logarithms of the factors.
        evolutionary: Whether each particle is a crossover of two, unit by unit, before it is perturbed.
        batches: Number of calibration batches, training batches kept to evaluate the loss on.
        seed: Seed of all random draws.

    Raises:
        ValueError: If a number is out of range, or ``selector`` is no selector that goes by scores alone.
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
        """Number of calibration batches, which is the argument ``batches``."""
        return self.batches

    def passes(self, groups: Sequence[UnitGroup]) -> int:
        """Return one pass for each particle, round and batch."""
        return self.population * self.rounds * self.batches

    @property
    def needs_example(self) -> bool:
        """Whether ``selector`` needs an example."""
        return self.selector.needs_example

    def resolve(self, target: float | None) -> float:
        """Return the share that ``selector`` derives from the target."""
        return self.selector.resolve(target)

    def measured(self, units: Units, model: nn.Module, example: Any) -> tuple[Units, LatencyTable | None]:
        """Return the units with the budget that ``selector`` measures, and its table."""
        return self.selector.measured(units, model, example)

    def with_table(self, table: LatencyTable) -> ParticleFilter:
        """Return the same with a table that ``selector`` takes."""
        return replace(self, selector=self.selector.with_table(table))

    def check(self, share: float, units: Units) -> None:
        """Raise ValueError if ``selector`` cannot reach the target."""
        self.selector.check(share, units)

    def limited(self, group: UnitGroup) -> UnitGroup:
        """Return a group with the limits that ``selector`` sets."""
        return self.selector.limited(group)

    def refuses(self, group: UnitGroup) -> str | None:
        """Return why ``selector`` cannot prune a group, or ``None`` if it can."""
        return self.selector.refuses(group)

    def select(self, candidates: Sequence[Candidates], fraction: float, costs: Costs) -> None:
        """Remove the units that the mask of the best particle removes."""
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
            put(self._search([torch.zeros(each.group.shape) for each in candidates], loss))
        except BaseException:  # ``kept`` may be the model's live mask, which a trial mask must not replace
            for each, kept in zip(candidates, before, strict=True):
                each.restart(kept)
            raise

    def _search(self, first: list[Tensor], loss: Callable[[Sequence[Tensor]], float]) -> list[Tensor]:
        """Return the best particle.

        Args:
            first: The particle to start from; the others of the first round are perturbations of it.
            loss: Returns the loss of a particle's mask.
        """
        draws = torch.Generator().manual_seed(self.seed)
        particles = [first, *(self._disturbed(first, draws) for _ in range(1, self.population))]
        for _ in range(self.rounds):
            losses = torch.tensor([loss(particle) for particle in particles], dtype=torch.float64)
            losses = losses.nan_to_num(nan=math.inf, posinf=math.inf)
            best = particles[int(losses.argmin())]
            particles = [best, *self._drawn(particles, losses, draws)]
        return best

    def _drawn(
        self, particles: Sequence[list[Tensor]], losses: Tensor, draws: torch.Generator
    ) -> list[list[Tensor]]:
        """Draw the next population, without the best particle.

        Args:
            particles: The present population.
            losses: One loss a particle, inf where it is not finite.
            draws: The random number generator.

        Returns:
            ``population - 1`` particles, drawn with a probability that falls with their loss, and perturbed.
        """
        known = losses[losses.isfinite()]
        if not len(known):
            losses = known = torch.zeros_like(losses)
        probabilities = torch.softmax((known.min() - losses) / known.std(correction=0).clamp_min(1e-12), 0)

        def draw() -> list[list[Tensor]]:
            chosen = torch.multinomial(probabilities, self.population, replacement=True, generator=draws)
            return [particles[index] for index in chosen[1:]]

        drawn = draw()
        if self.evolutionary:
            drawn = [_crossed(one, other, draws) for one, other in zip(drawn, draw(), strict=True)]
        return [self._disturbed(particle, draws) for particle in drawn]

    def _disturbed(self, particle: Sequence[Tensor], draws: torch.Generator) -> list[Tensor]:
        """Return the particle with normal noise added to its logarithmic factors."""
        return [noise + self.spread * torch.randn(noise.shape, generator=draws) for noise in particle]


def _crossed(one: Sequence[Tensor], other: Sequence[Tensor], draws: torch.Generator) -> list[Tensor]:
    """Return a particle that takes each unit's factor from one of two parents, at random."""
    return [
        torch.where(torch.rand(left.shape, generator=draws) < 0.5, left, right)
        for left, right in zip(one, other, strict=True)
    ]
