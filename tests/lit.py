"""A small LightningModule on real data, and Trainers for it, that tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightnings import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

Factory = Callable[[Any], Optimizer]


@functools.cache
def all_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits as 1 x 8 x 8 images, in order, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def digits(batch_size: int = 64, examples: int = 320) -> DataLoader[Any]:
    """The first of the handwritten digits."""
    images, labels = all_digits()
    return DataLoader(TensorDataset(images[:examples], labels[:examples]), batch_size)


class Lit(LightningModule):
    """Convolution, batch norm, two linear layers."""

    def __init__(self, optimizer: Factory = lambda p: SGD(p, 0.05, momentum=0.9)) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
        ).to(memory_format=torch.channels_last)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("acc", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Manual(Lit):
    """Two optimizers under manual optimization, each clipped by hand before its step."""

    def __init__(self, clip: float | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clip, self.lr = clip, lr

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            SGD(self.net[:4].parameters(), self.lr, momentum=0.9),
            torch.optim.Adam(self.net[4:].parameters(), self.lr / 10),
        ]


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return Trainer(**defaults | options)


def fit(folder: Path, model: Lit, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Trainer:
    """Trains on 5 batches an epoch, in the same order in every call."""
    run = trainer(folder, *callbacks, **options)
    run.fit(model, digits(), digits(examples=100), ckpt_path=ckpt_path)
    return run


def seeded(make: Callable[[], Lit]) -> Lit:
    """A model whose initial weights are the same in every call."""
    seed_everything(0, verbose=False)
    return make()


def hooks(model: LightningModule, run: Trainer) -> int:
    """How many hooks are left on a module and the optimizers of its Trainer."""
    modules = sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and value
    )
    return modules + sum(
        len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        for optimizer in run.optimizers
    )


def same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal, bit for bit."""
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
