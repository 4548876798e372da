"""Number of live tensors, resident memory and step times over a long fit with many pruning events.

    python recipes/benchmarks/long.py --steps 10000 --every 50

The model is a small convolutional network on handwritten digits. Each measurement is made halfway between two
events.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from resident import resident
from shared import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ActivationTaylor, Channels, Cubic, NofM, PruningCallback, Taylor
from lightning_prune.schedules.base import Schedule

_WARM = 1000  # number of first steps that the comparison of memory and time leaves out


class Net(LightningModule):
    """Two convolutions and a linear classifier, for images of 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, whose state has two numbers for each weight."""
        return torch.optim.Adam(self.parameters(), 1e-3)


class Looks(Callback):
    """Measures the memory and the step times of the process at regular steps.

    Args:
        every: Number of steps from one measurement to the next.

    Attributes:
        tensors: Step to number of live tensors.
        bytes: Step to resident memory in bytes.
        seconds: Step to median seconds of the steps since the last measurement.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._since = time.perf_counter()
        self._times: list[float] = []
        self.tensors: dict[int, int] = {}
        self.bytes: dict[int, int] = {}
        self.seconds: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time of a step, and measure if it is the middle between two multiples of ``every``."""
        self._times.append(time.perf_counter() - self._since)
        step = trainer.global_step
        if step % self._every == self._every // 2:
            gc.collect()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # isinstance makes some libraries' objects warn
                self.tensors[step] = sum(isinstance(each, Tensor) for each in gc.get_objects())
            self.bytes[step] = resident()
            self.seconds[step] = statistics.median(self._times)
            self._times.clear()
        self._since = time.perf_counter()


WAYS: dict[str, Callable[[Schedule], PruningCallback | None]] = {
    "none": lambda schedule: None,
    "weights": lambda schedule: PruningCallback(0.9, criterion=Taylor(), schedule=schedule),
    "channels": lambda schedule: PruningCallback(
        0.5, criterion=ActivationTaylor(), structure=Channels(), schedule=schedule
    ),
    "pattern": lambda schedule: PruningCallback(criterion=Taylor(), selector=NofM(2, 4), schedule=schedule),
}


def trend(looks: dict[int, int]) -> tuple[float, float]:
    """Return the growth in bytes per step, by least squares, and its standard error.

    Args:
        looks: Step to bytes.
    """
    steps, values = (np.array(each, float) for each in zip(*looks.items(), strict=True))
    (slope, _), covariance = np.polyfit(steps, values, 1, cov=True)
    return float(slope), float(covariance[0, 0] ** 0.5)


def main() -> None:
    """Train once for each way of pruning, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=50, help="steps from one event to the next")
    parser.add_argument("--pruning", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = DataLoader(TensorDataset(images, torch.tensor(labels)), 32, shuffle=True, drop_last=True)
    table = Table("pruning", "events", "live tensors", "resident MB", "growth, bytes a step", "step, ms")
    for name in options.pruning:
        last = f"{options.steps - options.every}st"
        pruning = WAYS[name](Cubic(f"{options.every}st", last, every=f"{options.every}st"))
        looks = Looks(options.every)
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                max_steps=options.steps,
                max_epochs=-1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
                callbacks=[looks] if pruning is None else [pruning, looks],
            ).fit(Net(), data)
        events = 0 if pruning is None else sum(entry.metric is None for entry in pruning.report.history)
        late = {step: value for step, value in looks.bytes.items() if step > _WARM}
        (first, *_, final), slope = late, trend(late)
        times = [value for step, value in looks.seconds.items() if step > _WARM]
        third = len(times) // 3
        begin, end = (1000 * statistics.median(part) for part in (times[:third], times[-third:]))
        table.row(
            name,
            events,
            f"{looks.tensors[first]} to {looks.tensors[final]}",
            f"{late[first] / 1e6:.1f} to {late[final] / 1e6:.1f}",
            f"{slope[0]:.0f} ± {slope[1]:.0f}",
            f"{begin:.2f} to {end:.2f}",
        )


if __name__ == "__main__":
    main()
