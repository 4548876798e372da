"""Selectors: the choice of the units to remove, given the scores of each unit group."""

from lightning_prune.selectors.base import Costs, Selector
from lightning_prune.selectors.by_score import Global, NofM, PerLayer, Threshold
from lightning_prune.selectors.particle_filter import ParticleFilter

__all__ = ["Costs", "Global", "NofM", "ParticleFilter", "PerLayer", "Selector", "Threshold"]
