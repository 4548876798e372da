"""Pruning for PyTorch Lightning: one callback, exact sparsity, masks that survive a resume."""

from lightning_prune.best import PrunedCheckpoint, PrunedEarlyStopping
from lightning_prune.callback import PruningCallback
from lightning_prune.compaction import CompactionError, compact
from lightning_prune.criteria import (
    FPGM,
    LAMP,
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    BatchNormScale,
    Criterion,
    Fisher,
    Gradient,
    LocalCriterion,
    Magnitude,
    Movement,
    OptimalBrainDamage,
    Oracle,
    Random,
    Taylor,
    Wanda,
)
from lightning_prune.export import export_onnx
from lightning_prune.guard import Guard
from lightning_prune.loading import load_compact
from lightning_prune.losses import Losses
from lightning_prune.measuring import measure
from lightning_prune.packed import load_packed, save_packed
from lightning_prune.pruner import Pruner
from lightning_prune.report import Report
from lightning_prune.rewind import Rewind
from lightning_prune.schedules import Cubic, Exponential, Linear, OneShot, Schedule, Steps
from lightning_prune.selectors import Global, NofM, ParticleFilter, PerLayer, Selector, Threshold
from lightning_prune.structures import Blocks, Channels, Heads, Structure, Unstructured
from lightning_prune.sweep import Sensitivity, sensitivity

__all__ = [
    "FPGM",
    "LAMP",
    "APoZ",
    "ActivationNorm",
    "ActivationTaylor",
    "BatchNormScale",
    "Blocks",
    "Channels",
    "CompactionError",
    "Criterion",
    "Cubic",
    "Exponential",
    "Fisher",
    "Global",
    "Gradient",
    "Guard",
    "Heads",
    "Linear",
    "LocalCriterion",
    "Losses",
    "Magnitude",
    "Movement",
    "NofM",
    "OneShot",
    "OptimalBrainDamage",
    "Oracle",
    "ParticleFilter",
    "PerLayer",
    "PrunedCheckpoint",
    "PrunedEarlyStopping",
    "Pruner",
    "PruningCallback",
    "Random",
    "Report",
    "Rewind",
    "Schedule",
    "Selector",
    "Sensitivity",
    "Steps",
    "Structure",
    "Taylor",
    "Threshold",
    "Unstructured",
    "Wanda",
    "compact",
    "export_onnx",
    "load_compact",
    "load_packed",
    "measure",
    "save_packed",
    "sensitivity",
]
