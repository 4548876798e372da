"""How much a unit matters: one short file a family."""

from lightning_prune.criteria.base import Criterion, LocalCriterion, Needs
from lightning_prune.criteria.gradients import Fisher, Gradient, Movement, Taylor
from lightning_prune.criteria.weights import Magnitude, Random

__all__ = [
    "Criterion",
    "Fisher",
    "Gradient",
    "LocalCriterion",
    "Magnitude",
    "Movement",
    "Needs",
    "Random",
    "Taylor",
]
