"""Whether a channel's score should count the weights that read it, too.

    python recipes/benchmarks/readers.py --init-from resnet20.pt --root DIR --out FILE.json

A trained ResNet-20 is pruned at once, with gradients of 20 batches, until a share of its multiply-adds is gone.
Accuracy is that on the validation images without any retraining, once statistics of BatchNorm are taken anew on
the same batches. The test set is not read.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1]))

from classifier import Classifier
from data import Digits, ImageFolder, Images

from lightning_prune import Channels, Criterion, Global, Magnitude, Pruner, Taylor, compact
from lightning_prune.units.groups import Units

Batches = list[tuple[Tensor, Tensor]]
EXAMPLE = torch.zeros(1, 3, 32, 32)
ARMS: dict[str, tuple[Criterion, Global]] = {
    "Taylor": (Taylor(), Global(budget="macs")),
    "Taylor, normalize cost": (Taylor(), Global(budget="macs", normalize="cost")),
    "Magnitude L1, normalize mean": (Magnitude(p=1), Global(budget="macs", normalize="mean")),
}


@dataclass(frozen=True, repr=False)
class WithReaders(Channels):
    """Channels whose scores count what reads them."""

    def units(self, model: torch.nn.Module, example: Any = None) -> Units:
        """The same groups."""
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
    batches: Batches,
    weights: str,
) -> float:
    """Of one pruned network."""
    net = Classifier(init_from=weights).net.train()
    pruner = Pruner(
        net,
        target,
        criterion=criterion,
        structure=structure,
        selector=selector,
        schedule=None,
        example=EXAMPLE,
    )
    for images, labels in batches:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        pruner.observe()
    pruner.prune(1.0)
    smaller = compact(net, pruner.masks, EXAMPLE)
    update_bn(batches, smaller)
    metric = MulticlassAccuracy(num_classes=10, average="micro")
    smaller.eval()
    with torch.inference_mode():
        for batch in data.val_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            metric(smaller(images), labels)
    return float(metric.compute())


def images(root: str | None) -> tuple[Images, Batches]:
    """All images, and the training batches to look at."""
    torch.manual_seed(0)
    data = ImageFolder(root=root) if root else Digits()
    data.prepare_data()
    data.setup("fit")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in islice(data.train_dataloader(), 20)]
    return data, batches


def main() -> None:
    """Prints a row for each criterion and structure as it comes, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--init-from", required=True, help="a trained ResNet-20")
    parser.add_argument("--root", help="an ImageFolder of CIFAR-10; without, the embedded digits")
    parser.add_argument("--out", type=Path, default=Path("readers.json"))
    options = parser.parse_args()
    data, batches = images(options.root)
    heads = " | ".join(f"{100 * target:.0f} %" for target in options.targets)
    print(f"| criterion | counted | {heads} |\n|{' --- |' * (2 + len(options.targets))}")
    rows = []
    for arm, (criterion, selector) in ARMS.items():
        for counted, structure in STRUCTURES.items():
            found = [
                accuracy(criterion, selector, structure, target, data, batches, options.init_from)
                for target in options.targets
            ]
            rows.append({"criterion": arm, "counted": counted, "accuracy": found})
            shown = " | ".join(f"{100 * each:.2f}" for each in found)
            print(f"| {arm} | {counted} | {shown} |", flush=True)
            options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
