"""Criteria: how much each unit matters, as a score from its weights, gradients, activations or the loss."""

from lightning_prune.criteria.activations import (
    ActivationCriterion,
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    Wanda,
)
from lightning_prune.criteria.base import Criterion, LocalCriterion
from lightning_prune.criteria.gradients import Fisher, Gradient, Movement, Taylor
from lightning_prune.criteria.losses import LossCriterion, OptimalBrainDamage, Oracle
from lightning_prune.criteria.weights import FPGM, LAMP, BatchNormScale, Magnitude, Random

__all__ = [
    "FPGM",
    "LAMP",
    "APoZ",
    "ActivationCriterion",
    "ActivationNorm",
    "ActivationTaylor",
    "BatchNormScale",
    "Criterion",
    "Fisher",
    "Gradient",
    "LocalCriterion",
    "LossCriterion",
    "Magnitude",
    "Movement",
    "OptimalBrainDamage",
    "Oracle",
    "Random",
    "Taylor",
    "Wanda",
]
