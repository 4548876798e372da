"""Pruning without training: what a PruningCallback removes by the end of a fit, at once, on a few batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lightning_prune.callbacks.lone_callback import only_callback, validated
from lightning_prune.callbacks.pruning import PruningCallback
from lightning_prune.callbacks.state import PruningState
from lightning_prune.core.averages import averaged_modules
from lightning_prune.core.files import read_file
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.parts import check_counts
from lightning_prune.core.probes import evaluation_mode
from lightning_prune.core.progress import allow_progress_bars
from lightning_prune.export.compacted import load_compact, load_weights_, plans_in
from lightning_prune.pruner import Pruner
from lightning_prune.report.report import Report
from lightning_prune.statistics.calibration import Calibration
from lightning_prune.statistics.losses import Losses
from lightning_prune.statistics.observer import Needs
from lightning_prune.statistics.reconstruction.reconstruct import Reconstruct
from lightning_prune.training.batch_norms import copy_statistics_, renew_statistics_
from lightning_prune.training.calibration_passes import calibration_passes
from lightning_prune.training.lightning_packages import (
    LightningDataModule,
    LightningModule,
    Trainer,
    rank_zero_warn,
)
from lightning_prune.training.sandbox import find_probe, training_loss
from lightning_prune.training.trainer_data import training_batches
from lightning_prune.training.trainer_queries import shows_progress


@dataclass(frozen=True)
class OneshotResult:
    """What :func:`oneshot` has done.

    Args:
        report: The report of the pruned network.
        dense: The validation metrics before; empty without validation data.
        pruned: The validation metrics after.
        renewed: Whether the statistics of batch norms were taken anew.
    """

    report: Report
    dense: dict[str, float]
    pruned: dict[str, float]
    renewed: bool


def oneshot(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | PathLike[str] | None = None,
    *,
    batches: int | None = None,
    path: str | Path | None = None,
) -> OneshotResult:
    """Prune a trained network to the target without training, on a few training batches.

    The network is pruned as the Trainer's PruningCallback says, its schedule, rewind and guard left aside. The
    weights that are left make up for those that went, by the callback's ``reconstruct`` or, if it has none, by
    ``Reconstruct()``. The statistics of batch norms are taken anew if that lowers the loss on the batches. With
    ``compact=True`` the network is compacted. It is validated before and after. What requires gradients counts
    as trained; units that are 0 already are kept at that with the callback's ``keep_zeros=True``.

    The callback holds the masks then: a ``trainer.fit`` that follows goes on from them.

    Args:
        trainer: A Trainer with one PruningCallback, in one process.
        model: The trained module, which is changed in place.
        datamodule: Provides the data, if the module does not.
        ckpt_path: A checkpoint to take the weights from.
        batches: How many training batches are used; by default as many as the callback's parts would keep.
        path: A checkpoint to write in the end, as ``trainer.save_checkpoint`` does.

    Returns:
        The report, and the metrics of both validations.

    Raises:
        ValueError: If there is not one PruningCallback, there are several processes, the module holds a weight
            average or is compacted already, or the callback's parts do not fit it.
        CompactionError: If outputs of the compacted network would differ; the model is unchanged then.
    """
    callback = _only_callback(trainer, model)
    reconstruct = callback.reconstruct or Reconstruct()
    parts = replace(callback._parts, rewind=None, guard=None)
    parts = replace(parts, reconstruct=reconstruct)
    kept = max(reconstruct.batches, parts.criterion.held, parts.selector.held)
    count = kept if batches is None else batches
    check_counts(batches=count)
    if ckpt_path is not None:
        checkpoint = read_file(ckpt_path, "ckpt_path")
        if plans_in(checkpoint):
            raise ValueError(f"ckpt_path={str(ckpt_path)!r} is of a compacted network: give one that is not.")
        load_compact(checkpoint, model)
    dense = validated(trainer, model, datamodule)
    data = training_batches(trainer, model, datamodule, count)
    state = PruningState(parts)
    twin = copy_model(model).to(trainer.strategy.root_device)
    twin.trainer = trainer
    probe = find_probe(trainer, twin, data[0]) if parts.needs_probe else None
    with allow_progress_bars(shows_progress(trainer)):
        state.bind(twin, probe)
        renewed = _prune(trainer, twin, state, data)
        state.network.count()
        state.example.capture_forward(trainer, twin, data[0], on_copy=True)
        work = state.example.workload(twin, parts.measure_seconds)
        if parts.compact and probe is not None:
            state.network.compact_(probe, work, (), (), state.report(replace(work, seconds=0.0)))
    plans = [] if state.network.plan is None else [state.network.plan]
    load_weights_(model, twin.state_dict(), plans)
    state.history.record_event(0, 0, state.network.sparsity)
    report = state.report(work)
    _hand_over(callback, model, state.state_dict(0))
    pruned = validated(trainer, model, datamodule)
    if path is not None:
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path)
    return OneshotResult(report, dense, pruned, renewed)


def _only_callback(trainer: Trainer, model: LightningModule) -> PruningCallback:
    """Return the Trainer's PruningCallback.

    Raises:
        ValueError: If there is not one, or the model, the Trainer or the callback's state does not fit.
    """
    callback = only_callback(trainer, model, "oneshot")
    if averages := averaged_modules(model):
        raise ValueError(
            f"{' and '.join(averages)} averages weights, which would stay those of the dense network: leave it"
            " out of the module, or copy its weights into the network first."
        )
    return callback


def _hand_over(callback: PruningCallback, model: LightningModule, saved: dict[str, Any]) -> None:
    """Let a callback show the masks of a saved state, and its next fit go on from them."""
    callback.reset()
    callback._state = PruningState.of_saved(model, saved, callback._parts)
    callback._state.pending, callback._state.given = saved, True


def _prune(trainer: Trainer, twin: LightningModule, state: PruningState, data: Sequence[Any]) -> bool:
    """Prune and reconstruct a copy of the module, and return whether batch norms got new statistics."""
    pruner, parts = state.network.pruner, state.parts
    assert pruner is not None
    passes = calibration_passes(trainer, twin, data)
    loss = training_loss(trainer)
    with evaluation_mode(twin):
        buffers = [each.clone() for each in twin.buffers()]
        _observe(pruner, trainer, twin, data, passes)
        for buffer, earlier in zip(twin.buffers(), buffers, strict=True):
            buffer.copy_(earlier)  # such as counters of a step
        pruner.prune(
            1.0,
            losses=Losses(loss, data),
            reconstruct=parts.reconstruct,
            batches=Calibration(passes, warn=rank_zero_warn),
        )
        renewed = copy_model(twin)
        try:
            renew_statistics_(renewed.eval(), passes)
            found, expected = (
                sum(float(loss(copy_model(each), batch)) for batch in data) for each in (renewed, twin)
            )
        except ValueError:  # a step without a loss, or a batch of one example
            return False
        if found < expected:
            copy_statistics_(renewed, twin)
        return found < expected


def _observe(
    pruner: Pruner, trainer: Trainer, twin: LightningModule, data: Sequence[Any], passes: Sequence[Any]
) -> None:
    """Give the pruner what its criterion needs to see of steps: forward passes and, if it must be, backward."""
    observer = pruner.activations
    backward = Needs.GRADIENT in pruner.needs or (observer is not None and observer.backward)
    if observer is None and not backward:
        return
    loss = training_loss(trainer)
    for batch, forward in zip(data, passes, strict=True):
        with torch.set_grad_enabled(backward), pruner.watch():
            if backward:
                loss(twin, batch).backward()
            else:
                forward(twin)
        pruner.observe()
        twin.zero_grad()
