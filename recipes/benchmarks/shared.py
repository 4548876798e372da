"""Helpers of all benchmarks: command-line arguments, data, the trained network, tables and JSON files."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from classifier import Classifier
from data import Digits, ImageFolder, Images
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

Batch: TypeAlias = tuple[Tensor, Tensor]

EXAMPLE = torch.zeros(1, 3, 32, 32)


def arguments(doc: str, out: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the first line of a module's docstring.

    Args:
        doc: The docstring of the module.
        out: Default of ``--out``, the path of the JSON file; ``None`` for a parser without ``--out``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if out is not None:
        parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def add_data(parser: argparse.ArgumentParser, *, trained: bool = False) -> None:
    """Add ``--init-from``, the weights for :func:`network`, and ``--root``, the folder for :func:`images`.

    Args:
        parser: The parser.
        trained: Whether the benchmark needs a trained network.
    """
    scratch = "" if trained else "; without, it starts from scratch"
    parser.add_argument("--init-from", required=trained, help=f"a trained ResNet-20{scratch}")
    parser.add_argument("--root", help="an ImageFolder of CIFAR-10; without, the embedded digits")


def add_training(parser: argparse.ArgumentParser, *, epochs: int | list[int], train_size: int | None) -> None:
    """Add ``--train-size``, ``--epochs``, which takes several if its default is a list, and ``--lr``."""
    parser.add_argument("--train-size", type=int, default=train_size)
    parser.add_argument("--epochs", type=int, nargs="+" if isinstance(epochs, list) else None, default=epochs)
    parser.add_argument("--lr", type=float, default=0.02)


def images(options: argparse.Namespace) -> Images:
    """Return the data module of ``--root``, or the embedded digits."""
    if options.root is None:
        return Digits()
    return ImageFolder(root=options.root, train_size=getattr(options, "train_size", None))


def training_batches(data: Images, count: int) -> list[Batch]:
    """Return the first ``count`` training batches, normalized and not augmented."""
    data.prepare_data()
    data.setup("fit")
    return [data.on_after_batch_transfer(batch, 0) for batch in islice(data.train_dataloader(), count)]


def calibration_and_validation(options: argparse.Namespace, seed: int = 0) -> tuple[list[Batch], list[Batch]]:
    """Return ``--batches`` training batches and all of validation, not augmented.

    Args:
        options: The command line.
        seed: Decides which training images there are.
    """
    data = images(options)
    data.augment = False
    torch.manual_seed(seed)
    batches = training_batches(data, options.batches)
    return batches, [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]


def network(weights: str | None) -> nn.Module:
    """Return a ResNet-20 in training mode.

    Args:
        weights: File of its weights; ``None`` for random ones.
    """
    return Classifier(init_from=weights).net.train()


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    inputs, labels = batch
    return F.cross_entropy(net(inputs), labels)


def quiet_trainer(epochs: int, callbacks: list[Callback], precision: Any = "32-true") -> Trainer:
    """Return a Trainer that prints and writes nothing.

    Args:
        epochs: Number of epochs.
        callbacks: Its callbacks.
        precision: Its precision.
    """
    warnings.filterwarnings("ignore", module="lightning")
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit_and_test(model: Classifier, data: Images, trainer: Trainer) -> tuple[float, float, float]:
    """Train a model, and test it once.

    Returns:
        Accuracy on the validation images after the last epoch, accuracy on the test images, seconds of the fit.
    """
    begun = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begun
    validated = float(trainer.callback_metrics["val_acc"])
    (tested,) = trainer.test(model, data, verbose=False)
    return validated, tested["test_acc"], seconds


class Table:
    """A Markdown table that is printed row by row, so that a long run shows each result at once.

    Args:
        columns: Headings of the columns.
    """

    def __init__(self, *columns: str) -> None:
        self.row(*columns)
        self.row(*("---" for _ in columns))

    def row(self, *cells: object) -> None:
        """Print a row."""
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def percent(*shares: float) -> list[str]:
    """Return each share as text in per cent, with two decimals."""
    return [f"{100 * share:.2f}" for share in shares]


def save(path: Path, rows: Sequence[Any] | dict[str, Any]) -> None:
    """Write results as JSON."""
    path.write_text(f"{json.dumps(rows, indent=2)}\n")
