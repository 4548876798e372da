"""Latency of networks whose channels are pruned to a target in multiply-adds, and how exactly it is met.

    python recipes/benchmarks/latency.py --out FILE.json

Channels are removed in the order of their magnitude, divided by the mean of their group, until the target is
met. Weights are random. Widths are multiples of 8 by default (``--round-to``). Multiply-adds are counted by
torch on the compacted network. Latency is the median over rounds in which the dense and the compacted network
take turns, in channels-last format. Networks for small images run on 32x32 pixels, the others on 224x224.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from networks import NETWORKS
from shared import Table, arguments, save
from torch import nn

from lightning_prune import Channels, Global, Pruner, compact
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.report.cost import latency, parameters

SELECTOR = Global(budget="macs", normalize="mean")


def build(name: str) -> tuple[nn.Module, int]:
    """Return a network in evaluation mode, and the width of its images in pixels."""
    torch.manual_seed(0)
    small = name in NETWORKS
    model = NETWORKS[name](classes=10) if small else torchvision.models.get_model(name, weights=None)
    return model.eval().to(memory_format=torch.channels_last), 32 if small else 224


def measure(name: str, target: float, batches: list[int], seconds: float, round_to: int) -> dict[str, Any]:
    """Prune one network and return its results.

    Args:
        name: Name of the network.
        target: Share of the multiply-adds to remove.
        batches: Batch sizes to measure the latency of.
        seconds: Duration of the measurement for each batch size.
        round_to: Widths are rounded to multiples of this.

    Returns:
        Among others "macs", "parameters" and, for each batch size, "latency" in seconds; each is a pair of
        numbers, of the dense and of the compacted network.
    """
    model, pixels = build(name)
    image = torch.randn(1, 3, pixels, pixels)
    structure = Channels(round_to=round_to)
    pruner = Pruner(model, target, structure=structure, selector=SELECTOR, schedule=None, example=image)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, image)
    counts = [sum(macs_by_parameter(each, image).values()) for each in (model, smaller)]
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
    """Print a row for each network and target as soon as it is done, and write JSON."""
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
