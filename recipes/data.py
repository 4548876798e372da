"""Data modules of small images: training, validation and test images in memory as uint8 tensors, split once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images as one uint8 tensor N x 3 x 32 x 32; a whole batch is read by one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self[torch.tensor(indices)]

    def subset(self, indices: Tensor) -> TensorImages:
        """Return the images at some indices, with their labels."""
        return TensorImages(*self[indices])


class Images(LightningDataModule, ABC):
    """Images of ten classes; validation images are split off the training images, test images are separate.

    Args:
        batch_size: Number of images in a batch.
        val_size: Number of training images that are held out for validation.
        augment: Whether training images are randomly shifted by up to 4 pixels and mirrored.
        train_size: Number of training images to use of those that are not held out; all by default.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, batch_size: int, val_size: int, augment: bool, train_size: int | None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_size = val_size
        self.augment = augment
        self.train_size = train_size

    @abstractmethod
    def load(self, train: bool) -> TensorImages:
        """Return all training images, validation images included, or all test images."""

    def setup(self, stage: str) -> None:
        """Read the images of a stage. The test images are read in stage "test" only.

        Raises:
            ValueError: If ``val_size`` leaves no training or no validation image.
        """
        if stage == "test":
            self.test = self.load(train=False)
        elif not hasattr(self, "train"):
            images = self.load(train=True)
            if not 0 < self.val_size < len(images):
                raise ValueError(f"val_size={self.val_size} must lie between 0 and {len(images)} images.")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            self.train = images.subset(order[: -self.val_size][: self.train_size])
            self.val = images.subset(order[-self.val_size :])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the training images in batches, shuffled."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the validation images in batches, in a fixed order."""
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test images in batches, in a fixed order."""
        return self._loader(self.test)

    def _loader(self, images: TensorImages, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        # no worker processes: indexing a uint8 tensor takes less time than they would
        return DataLoader(images, self.batch_size, shuffle=shuffle, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalize a whole batch on its device, and augment it in training."""
        images, labels = batch
        mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (self.mean, self.std))
        images = (images / 255 - mean) / std
        if self.augment and self.trainer is not None and self.trainer.training:
            images = shift_and_mirror(images)
        return images.contiguous(memory_format=torch.channels_last), labels


def shift_and_mirror(images: Tensor, by: int = 4) -> Tensor:
    """Return images N x C x H x W, each randomly shifted and, with probability 1/2, mirrored horizontally.

    Args:
        images: The images.
        by: Largest shift in pixels, per direction; the pixels that become free are 0.
    """
    count, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (by,) * 4)
    top, left = torch.randint(0, 2 * by + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    batch = torch.arange(count, device=device)
    # index tensors on both sides of a slice: their dimensions come first, so that channels are the last one
    cut = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


class Digits(Images):
    """The 1,797 handwritten digits of scikit-learn, of 8x8 pixels, enlarged to 3x32x32. Needs no download.

    Args:
        batch_size: Number of images in a batch.
        val_size: Number of training images that are held out for validation.
        augment: Whether training images are randomly shifted and mirrored. Off by default, since a mirrored
            digit is another digit.
        train_size: Number of training images to use of those that are not held out; all by default.
    """

    mean = (0.305, 0.305, 0.305)
    std = (0.376, 0.376, 0.376)

    def __init__(
        self, batch_size: int = 64, val_size: int = 300, augment: bool = False, train_size: int | None = None
    ) -> None:
        super().__init__(batch_size, val_size, augment, train_size)

    def load(self, train: bool) -> TensorImages:
        """Return the first 1,497 images for training, or the last 300 for testing."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels).view(-1, 1, 8, 8) * (255 / 16)
        images = F.interpolate(images, size=32, mode="bilinear").byte().expand(-1, 3, -1, -1)
        half = slice(0, 1497) if train else slice(1497, None)
        return TensorImages(images[half], torch.tensor(labels)[half])


class Colours(Images, ABC):
    """Colour images of 32x32 pixels, normalized with the channel means and deviations of CIFAR-10.

    Args:
        root: Folder of the data.
        batch_size: Number of images in a batch.
        val_size: Number of training images that are held out for validation.
        augment: Whether training images are randomly shifted by up to 4 pixels and mirrored.
        train_size: Number of training images to use of those that are not held out; all by default.
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_size: int = 5000,
        augment: bool = True,
        train_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_size, augment, train_size)
        self.root = root


class CIFAR10(Colours):
    """CIFAR-10 as published; torchvision downloads it into ``root`` if it is not there yet."""

    def prepare_data(self) -> None:
        """Download the data, unless they are in ``root``.

        Raises:
            RuntimeError: If the download fails; the message names the data modules that need no network.
        """
        try:
            datasets.CIFAR10(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"CIFAR-10 is not in {self.root!r} and could not be downloaded ({error}). Without a network,"
                " use --data Digits, or --data ImageFolder --data.root DIR with DIR/train/CLASS/*.jpg and"
                " DIR/test/CLASS/*.jpg."
            ) from error

    def load(self, train: bool) -> TensorImages:
        """Return the training or test images that torchvision reads."""
        raw = datasets.CIFAR10(self.root, train=train)
        return TensorImages(torch.from_numpy(raw.data).permute(0, 3, 1, 2), torch.tensor(raw.targets))


class ImageFolder(Colours):
    """Image files of 32x32 pixels in the folders ``root/train/CLASS`` and ``root/test/CLASS``."""

    def load(self, train: bool) -> TensorImages:
        """Return the training or test images, in the order of ``torchvision.datasets.ImageFolder``.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        folder = datasets.ImageFolder(str(Path(self.root) / ("train" if train else "test")))
        images = torch.stack([pil_to_tensor(image) for image, _ in folder])
        return TensorImages(images, torch.tensor(folder.targets))


def _as_it_is(batch: Any) -> Any:
    return batch
