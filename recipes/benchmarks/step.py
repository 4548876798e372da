"""What pruning adds to a training step: dense, Lightning's ModelPruning, and ours with each criterion.

    python recipes/benchmarks/step.py --batch-size 64 --out FILE.json

ResNet-18 with a CIFAR stem. In every round each arm trains in turn, in one process, for a few steps with 90 %
of the weights masked and statistics still gathered; times are from batch to batch. The figure is the median
over rounds of an arm's median step divided by the dense arm's of the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_prune import Fisher, Gradient, Magnitude, Movement, PruningCallback, Random, Steps, Taylor

STEPS = 3  # an epoch


class Net(LightningModule):
    """ResNet-18 as it is used on 32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(Callback):
    """Time from batch to batch, in the epochs that start with masks in place."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step begins, and the one before has ended."""
        now = time.perf_counter()
        if self.last is not None and trainer.current_epoch in (1, 2):
            self.steps.append(now - self.last)
        self.last = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Events at the next epoch's start are no part of a step."""
        self.last = None


def incumbent() -> Callback:
    """Masks from the first epoch's end on."""
    return ModelPruning(
        "l1_unstructured",
        amount=0.9,
        apply_pruning=lambda epoch: epoch == 0,
        make_pruning_permanent=False,
        use_lottery_ticket_hypothesis=False,
        parameter_names=["weight"],
    )


def ours(criterion: Any) -> Callback:
    """Masks from the second epoch on, and statistics until the fourth begins."""
    return PruningCallback(0.9, criterion=criterion, schedule=Steps({"1ep": 0.99, "3ep": 1.0}))


ARMS: dict[str, Callable[[], Callback | None]] = {
    "dense": lambda: None,
    "ModelPruning": incumbent,
    **{
        type(each).__name__: partial(ours, each)
        for each in (Magnitude(), Random(), Gradient(), Taylor(), Movement(), Fisher())
    },
}


def steps(arm: str, batch_size: int, accelerator: str) -> list[float]:
    """Times of the steps of one short fit."""
    torch.manual_seed(0)
    count = STEPS * batch_size
    data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
    clock, pruning = Clock(), ARMS[arm]()
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock] if pruning is None else [clock, pruning],
    )
    trainer.fit(Net(), DataLoader(data, batch_size))
    return clock.steps


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("step.json"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(options.rounds):
        taken = {arm: statistics.median(steps(arm, options.batch_size, options.accelerator)) for arm in ARMS}
        for arm, median in taken.items():
            ratios[arm].append(median / taken["dense"])
    options.out.write_text(json.dumps(ratios, indent=2))
    print("| arm | step, relative to dense | rounds |\n| --- | --- | --- |")
    for arm, found in ratios.items():
        print(f"| {arm} | {statistics.median(found):.3f} | {', '.join(f'{each:.3f}' for each in found)} |")


if __name__ == "__main__":
    main()
