"""Pruning for PyTorch Lightning: one callback, exact sparsity, masks that survive a resume."""

from lightning_prune.callbacks.monitors import PrunedCheckpoint, PrunedEarlyStopping
from lightning_prune.callbacks.pruning import PruningCallback
from lightning_prune.channels.compaction import CompactionError, compact
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
from lightning_prune.export.compacted import load_compact
from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.packed import load_packed, save_packed
from lightning_prune.pruner import Pruner
from lightning_prune.report.measurement import measure
from lightning_prune.report.report import Report
from lightning_prune.report.sensitivity import Sensitivity, sensitivity
from lightning_prune.schedules import Cubic, Exponential, Linear, OneShot, Schedule, Steps
from lightning_prune.selectors import Global, NofM, ParticleFilter, PerLayer, Selector, Threshold
from lightning_prune.statistics.losses import Losses
from lightning_prune.structures import Blocks, Channels, Heads, Structure, Unstructured
from lightning_prune.training.guard import Guard
from lightning_prune.training.rewind import Rewind

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
