"""Pruning for PyTorch Lightning: one callback, exact sparsity, masks that survive a resume."""

from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.callbacks.monitors import PrunedCheckpoint, PrunedEarlyStopping
from lightning_prune.callbacks.oneshot import OneshotResult, oneshot
from lightning_prune.callbacks.pruning import PruningCallback
from lightning_prune.callbacks.rounds import GoalResult, Round, prune_to_goal
from lightning_prune.channels.compaction.shrink import CompactionError, compact
from lightning_prune.channels.graph.rules import register_rule
from lightning_prune.channels.latency.table import LatencyTable
from lightning_prune.criteria.activations import ActivationNorm, ActivationTaylor, APoZ, Wanda
from lightning_prune.criteria.base import Criterion, LocalCriterion
from lightning_prune.criteria.gradients import Fisher, Gradient, Movement, Taylor
from lightning_prune.criteria.layer_errors import OptimalBrainSurgeon
from lightning_prune.criteria.losses import OptimalBrainDamage, Oracle
from lightning_prune.criteria.weights import FPGM, LAMP, BatchNormScale, Magnitude, Random
from lightning_prune.export.compacted import load_compact
from lightning_prune.export.config import update_config
from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.packed import load_packed, save_packed
from lightning_prune.export.sparse_kernels import SparseKernels, use_sparse_kernels
from lightning_prune.pruner import Pruner
from lightning_prune.report.latency import measure_latency
from lightning_prune.report.measurement import measure
from lightning_prune.report.report import Report
from lightning_prune.report.sensitivity import Sensitivity, sensitivity
from lightning_prune.schedules.base import Schedule
from lightning_prune.schedules.curves import Cubic, Exponential, Linear, OneShot, Steps
from lightning_prune.selectors.base import Selector
from lightning_prune.selectors.by_score import Global, NofM, PerLayer, Threshold
from lightning_prune.selectors.particle_filter import ParticleFilter
from lightning_prune.statistics.losses import Losses
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.structures.base import Structure
from lightning_prune.structures.channels import Channels, Heads
from lightning_prune.structures.experts import Experts
from lightning_prune.structures.weights import Blocks, Unstructured
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
    "Distillation",
    "Experts",
    "Exponential",
    "Fisher",
    "Global",
    "GoalResult",
    "Gradient",
    "Guard",
    "Heads",
    "LatencyTable",
    "Linear",
    "LocalCriterion",
    "Losses",
    "Magnitude",
    "Movement",
    "NofM",
    "OneShot",
    "OneshotResult",
    "OptimalBrainDamage",
    "OptimalBrainSurgeon",
    "Oracle",
    "ParticleFilter",
    "PerLayer",
    "PrunedCheckpoint",
    "PrunedEarlyStopping",
    "Pruner",
    "PruningCallback",
    "Random",
    "Reconstruct",
    "Report",
    "Rewind",
    "Round",
    "Schedule",
    "Selector",
    "Sensitivity",
    "SparseKernels",
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
    "measure_latency",
    "oneshot",
    "prune_to_goal",
    "register_rule",
    "save_packed",
    "sensitivity",
    "update_config",
    "use_sparse_kernels",
]
