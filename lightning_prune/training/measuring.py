"""Measures models for the report of a fit: on the device of the fit, and without ending it by an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lightning_prune.core.tensors import to_model
from lightning_prune.report.cost import Workload
from lightning_prune.report.report import Report
from lightning_prune.training.lightning_packages import rank_zero_warn


def measured(measure: Callable[[Workload], Report], models: Sequence[nn.Module], work: Workload) -> Report:
    """Return the report measured on a workload, or on none if the forward pass fails."""
    try:
        # nothing is compiled for a report
        with torch.compiler.set_stance("force_eager"), _on_device(models, work) as placed:
            return measure(placed)
    except Exception as error:  # a user's forward may raise anything, and a report must not end a fit
        rank_zero_warn(f"The report goes without multiply-adds: forward failed with {error!r}.")
        return measure(Workload())


@contextmanager
def _on_device(models: Sequence[nn.Module], work: Workload) -> Iterator[Workload]:
    """Keep models and workload on the workload's device in a ``with`` block: the strategy has released it."""
    before = {parameter.device for model in models for parameter in model.parameters()}
    if work.example is None or work.device is None or len(before) != 1 or before == {work.device}:
        yield work
        return
    try:
        for model in models:
            model.to(work.device)
        yield replace(work, example=to_model(work.example, models[0]))
    finally:
        for model in models:
            model.to(next(iter(before)))
