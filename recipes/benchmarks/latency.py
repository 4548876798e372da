"""Multiply-adds that are wanted, that are left, and the time that they save.

    python recipes/benchmarks/latency.py --out FILE.json

Channels go by magnitude, as a share of their layer's mean, until the budget is met; weights are random, widths
multiples of 8 unless told otherwise. Multiply-adds are counted by torch on the compacted network. Latency is
the median over rounds in which the dense and the compacted network take turns, channels last. Networks for
small images see 32x32 pixels, the others 224x224.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from networks import NETWORKS
from shared import Table, arguments, save
from torch import nn

from lightning_prune import Channels, Global, Pruner, compact
from lightning_prune.report.cost import latency, macs, parameters

SELECTOR = Global(budget="macs", normalize="mean")


def build(name: str) -> tuple[nn.Module, int]:
    """A network, and how many pixels wide its images are."""
    torch.manual_seed(0)
    small = name in NETWORKS
    model = NETWORKS[name](classes=10) if small else torchvision.models.get_model(name, weights=None)
    return model.eval().to(memory_format=torch.channels_last), 32 if small else 224


def measure(name: str, target: float, batches: list[int], seconds: float, round_to: int) -> dict[str, Any]:
    """One row."""
    model, pixels = build(name)
    image = torch.randn(1, 3, pixels, pixels)
    structure = Channels(round_to=round_to)
    pruner = Pruner(model, target, structure=structure, selector=SELECTOR, schedule=None, example=image)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, image)
    counts = [macs(each, image)[""] for each in (model, smaller)]
    row: dict[str, Any] = {
        "network": name,
        "target": target,
        "round_to": round_to,
        "macs": counts,
        "parameters": [parameters(model), parameters(smaller)],
        "latency": {},
    }
    for batch in batches:
        images = image.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        row["latency"][batch] = latency([model, smaller], images, seconds)
    return row


def main() -> None:
    """Prints a row for each network and target as it comes, and writes JSON."""
    parser = arguments(__doc__, "latency.json")
    networks = ["vgg16_bn", "resnet20", "resnet56", "mobilenet_v2", "densenet121", "vit_b_16"]
    parser.add_argument("--networks", nargs="+", default=networks)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.67, 0.75])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pair of networks")
    options = parser.parse_args()
    torch.set_num_threads(2)
    table = Table("network", "wanted", "multiply-adds", *(f"batch {batch}" for batch in options.batches))
    rows = []
    for name in options.networks:
        for target in options.targets:
            row = measure(name, target, options.batches, options.seconds, options.round_to)
            rows.append(row)
            dense, left = row["macs"]
            times = (
                f"{1000 * before:.3g} to {1000 * after:.3g} ms: {before / after:.2f}x"
                for before, after in row["latency"].values()
            )
            table.row(name, f"{1 / (1 - target):.2f}x", f"{dense / left:.2f}x", *times)
            save(options.out, rows)


if __name__ == "__main__":
    main()
