"""The LightningModule of the recipes: an image classifier with SGD and a one-cycle learning-rate schedule."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from networks import NETWORKS
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class Classifier(LightningModule):
    """An image classifier with ten classes, for images of 32x32 pixels.

    Args:
        network: Name of the network.
        lr: Peak of the one-cycle learning-rate schedule.
        momentum: Nesterov momentum of SGD.
        weight_decay: Weight decay of SGD, applied to all parameters.
        init_from: Path of a file with the initial weights: the state dict of the network, or a checkpoint of
            this class. Random weights by default.
    """

    def __init__(
        self,
        network: Literal["cifar_cnn", "resnet20", "resnet56", "vgg16_bn"] = "resnet20",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="init_from")
        self.net = NETWORKS[network](classes=10).to(memory_format=torch.channels_last)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")
        if init_from is not None:
            self.net.load_state_dict(_weights(init_from))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on the validation images as ``val_acc``."""
        images, labels = batch
        self.val_acc(self(images), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on the test images as ``test_acc``."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with a one-cycle learning-rate schedule over all steps of the fit."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def _weights(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    return {name.removeprefix("net."): value for name, value in state.items()}
