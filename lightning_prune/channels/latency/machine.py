"""The name of the machine that a network runs on: its device, threads and version of PyTorch."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import nn


def machine_of(model: nn.Module) -> str:
    """Return the device of a model, the number of threads of a CPU, and the version of PyTorch, in words."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device.type}: {name}, torch {torch.__version__}"


def _processor() -> str:
    """Return the model of the processor, as Linux names it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
