"""Accuracy of pruning with and without the weights of the layers that read a channel in the channel's score.

    python recipes/benchmarks/readers.py --init-from resnet20.pt --root DIR --out FILE.json

A trained ResNet-20 is pruned in one shot, with gradients of 20 batches, until a share of its multiply-adds is
removed. Accuracy is that on the validation images, without any retraining, after the batch norm statistics are
recomputed on the same batches. The test set is not used.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from data import Images
from shared import (
    EXAMPLE,
    Batch,
    Table,
    add_data,
    arguments,
    images,
    loss_of,
    network,
    percent,
    save,
    training_batches,
)
from torch.optim.swa_utils import update_bn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import Channels, Criterion, Global, Magnitude, Pruner, Taylor, compact
from lightning_prune.units.groups import Units

ARMS: dict[str, tuple[Criterion, Global]] = {
    "Taylor": (Taylor(), Global(budget="macs")),
    "Taylor, normalize cost": (Taylor(), Global(budget="macs", normalize="cost")),
    "Magnitude L1, normalize mean": (Magnitude(p=1), Global(budget="macs", normalize="mean")),
}


@dataclass(frozen=True, repr=False)
class WithReaders(Channels):
    """Channels whose scores include the weights of the layers that read them."""

    def units(self, model: torch.nn.Module, example: Any = None) -> Units:
        """Return the groups of ``Channels``, in which the weights of the reading layers are scored, too."""
        found = super().units(model, example)
        groups = []
        for group in found.groups:
            readers = tuple(part for part in group.followers if part.weight.ndim > 1)
            rest = tuple(part for part in group.followers if part.weight.ndim == 1)
            groups.append(replace(group, slices=group.slices + readers, followers=rest))
        return replace(found, groups=tuple(groups))


STRUCTURES = {"makers": Channels(), "makers and readers": WithReaders()}


def accuracy(
    criterion: Criterion,
    selector: Global,
    structure: Channels,
    target: float,
    data: Images,
    batches: list[Batch],
    weights: str,
) -> float:
    """Return the accuracy of one network on the validation images after pruning, without retraining.

    Args:
        criterion: The criterion.
        selector: The selector.
        structure: The structure, which determines the weights that are scored.
        target: Share of the multiply-adds to remove.
        data: The images.
        batches: Training batches for gradients and batch norm statistics.
        weights: File of the network's weights.
    """
    net = network(weights)
    pruner = Pruner(
        net,
        target,
        criterion=criterion,
        structure=structure,
        selector=selector,
        schedule=None,
        example=EXAMPLE,
    )
    for batch in batches:
        net.zero_grad()
        loss_of(net, batch).backward()
        pruner.observe()
    pruner.prune(1.0)
    smaller = compact(net, pruner.masks, EXAMPLE)
    update_bn(batches, smaller)
    metric = MulticlassAccuracy(num_classes=10, average="micro")
    smaller.eval()
    with torch.inference_mode():
        for batch in data.val_dataloader():
            inputs, labels = data.on_after_batch_transfer(batch, 0)
            metric(smaller(inputs), labels)
    return float(metric.compute())


def data_and_batches(options: argparse.Namespace) -> tuple[Images, list[Batch]]:
    """Return the data module, and 20 training batches for gradients and batch norm statistics."""
    torch.manual_seed(0)
    data = images(options)
    return data, training_batches(data, 20)


def main() -> None:
    """Print a row for each criterion and structure as soon as it is done, and write JSON."""
    parser = arguments(__doc__, "readers.json")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    add_data(parser, trained=True)
    options = parser.parse_args()
    data, batches = data_and_batches(options)
    table = Table("criterion", "counted", *(f"{100 * target:.0f} %" for target in options.targets))
    rows = []
    for arm, (criterion, selector) in ARMS.items():
        for counted, structure in STRUCTURES.items():
            found = [
                accuracy(criterion, selector, structure, target, data, batches, options.init_from)
                for target in options.targets
            ]
            rows.append({"criterion": arm, "counted": counted, "accuracy": found})
            table.row(arm, counted, *percent(*found))
            save(options.out, rows)


if __name__ == "__main__":
    main()
