"""Targets in measured time: how exactly they are met, and against targets in multiply-adds at the same time.

    python recipes/benchmarks/latency_budget.py --out FILE.json [--init-from resnet20.pt --root DIR]

For each network and batch size the times of its layers are measured once. Then channels go until a share of the
time is gone, by magnitude over the mean of their group; and, for comparison, until so many multiply-adds are
gone that the time is the same by the table. Compacted and dense networks run in turn, on one thread, and the
processor's time counts. With a trained ResNet-20 it is pruned at once by Taylor over cost and reconstructed
without training: accuracy on the validation images. The other networks have random weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from networks import NETWORKS
from reconstruction import accuracy, ready
from shared import (
    EXAMPLE,
    Batch,
    Table,
    add_data,
    arguments,
    calibration_and_validation,
    network,
    percent,
    save,
)
from torch import nn
from torchvision.models import MobileNetV2, VisionTransformer

from lightning_prune import (
    Channels,
    Global,
    LatencyTable,
    Pruner,
    Reconstruct,
    Taylor,
    compact,
    measure_latency,
)
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.channels.latency.budget import LatencyBudget
from lightning_prune.core.clock import compute_time
from lightning_prune.core.probes import resize_batch
from lightning_prune.report.cost import latency

Normalize: TypeAlias = Literal["mean", "cost"]

_MOST, _HALVINGS = 0.8, 9  # the target in multiply-adds, and how often the interval of its fraction is halved


def mobilenet_v2(classes: int) -> nn.Module:
    """Return torchvision's MobileNet-V2 with the strides for 32x32 pixels."""
    settings = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model: nn.Module = MobileNetV2(classes, inverted_residual_setting=settings)
    model.get_submodule("features.0.0").stride = (1, 1)  # type: ignore[assignment]
    return model


def vit(classes: int) -> nn.Module:
    """Return a vision transformer of 6 layers, width 128, for patches of 4x4 pixels."""
    model: nn.Module = VisionTransformer(32, 4, 6, 4, 128, 512, num_classes=classes)
    return model


BUILD: dict[str, Callable[[int], nn.Module]] = {
    "vgg16_bn": NETWORKS["vgg16_bn"],
    "mobilenet_v2": mobilenet_v2,
    "resnet20": NETWORKS["resnet20"],
    "vit": vit,
}


def made(dense: nn.Module, target: float, selector: Global, batches: list[Batch], round_to: int) -> Pruner:
    """Return a pruner of a copy of a network, by Taylor if there are batches, otherwise by magnitude."""
    parts: dict[str, Any] = {"target": target, "structure": Channels(round_to=round_to), "selector": selector}
    if batches:
        return ready(copy.deepcopy(dense), parts | {"criterion": Taylor()}, batches)
    return Pruner(copy.deepcopy(dense), schedule=None, example=EXAMPLE.repeat(2, 1, 1, 1), **parts)


def at_same_time(pruner: Pruner, left: float, table: LatencyTable) -> float:
    """Return which fraction of a target in multiply-adds leaves a share of the time, by the table."""
    budget = LatencyBudget(table, table.groups)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        fraction = (low + high) / 2
        restore(pruner)
        pruner.select(fraction)
        kept = {each.name: each.slices[0].kept(pruner.masks[each.slices[0].name]) for each in pruner.groups}
        low, high = (fraction, high) if budget.cost(kept) > left * budget.total else (low, fraction)
    restore(pruner)
    return (low + high) / 2


def restore(pruner: Pruner) -> None:
    """Let a pruner keep all units."""
    for mask in pruner.masks.values():
        mask.fill_(True)


def prune(pruner: Pruner, fraction: float, batches: list[Batch]) -> None:
    """Prune to a fraction of the target, and reconstruct the network if there are batches."""
    if batches:
        pruner.prune(fraction, reconstruct=Reconstruct(), batches=[inputs for inputs, _ in batches])
    else:
        pruner.prune(fraction)


def shares(dense: nn.Module, pruner: Pruner, batch: int, seconds: float) -> tuple[float, float, float]:
    """Return the shares of time, multiply-adds and parameters that are left in the compacted network."""
    smaller = compact(pruner._model, pruner.masks, EXAMPLE.repeat(2, 1, 1, 1))
    both = [dense, smaller]
    before, after = latency(
        both, resize_batch(torch.randn(1, 3, 32, 32), batch), seconds, 2 * seconds, compute_time
    )
    macs = [sum(macs_by_parameter(each, EXAMPLE).values()) for each in both]
    numbers = [sum(each.numel() for each in one.parameters()) for one in both]
    return after / before, macs[1] / macs[0], numbers[1] / numbers[0]


def rows_of(
    name: str, batch: int, options: argparse.Namespace, held: list[Batch], batches: list[Batch]
) -> list[Any]:
    """Return the results of one network and batch size."""
    torch.manual_seed(0)
    trained = bool(batches) and name == "resnet20"
    dense = network(options.init_from).eval() if trained else BUILD[name](10).eval()
    used = batches if trained else []
    begun = time.perf_counter()
    table = measure_latency(dense, torch.randn(2, 3, 32, 32), Channels(round_to=options.round_to), batch)
    taken = time.perf_counter() - begun
    normalize: Normalize = "cost" if used else "mean"
    rows = []
    for target in options.targets:
        selector = Global("latency", normalize=normalize, table=table)
        row: dict[str, Any] = {"network": name, "batch": batch, "wanted": 1 - target, "seconds": taken}
        row |= {"ms": 1000 * table.dense, "error": table.error, "spread": table.spread, "accuracy": {}}
        try:
            arms = {"time": made(dense, target, selector, used, options.round_to)}
        except ValueError as error:  # out of reach
            rows.append(row | {"refused": str(error)})
            continue
        prune(arms["time"], 1.0, used)
        reached = arms["time"].latency_target
        assert reached is not None
        row["expected"] = reached.expected
        arms["macs"] = made(dense, _MOST, Global("macs", normalize=normalize), used, options.round_to)
        prune(arms["macs"], at_same_time(arms["macs"], reached.expected, table), used)
        for arm, pruner in arms.items():
            row[arm] = shares(dense, pruner, batch, options.seconds)
            if used:
                row["accuracy"][arm] = accuracy(pruner._model, held)
        rows.append(row)
    return rows


def main() -> None:
    """Print a row for each network, batch size and target, and write JSON."""
    parser = arguments(__doc__ or "", "latency_budget.json")
    add_data(parser)
    parser.add_argument("--networks", nargs="+", default=list(BUILD), choices=list(BUILD))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.33, 0.5])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8, help="calibration batches of the trained network")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pair of networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held: list[Batch] = []
    batches: list[Batch] = []
    if options.init_from is not None:
        batches, held = calibration_and_validation(options)
    head = ("network", "batch", "dense", "wanted", "by the table", "measured", "multiply-adds", "parameters")
    same = ("same time by multiply-adds: measured", "multiply-adds", "parameters")
    table = Table(*head, *same, "accuracy: time", "multiply-adds", "table's error")
    results: list[Any] = []
    for name in options.networks:
        for batch in options.batch_sizes:
            for row in rows_of(name, batch, options, held, batches):
                results.append(row)
                save(options.out, results)
                start = (name, batch, f"{row['ms']:.3g} ms", f"{row['wanted']:.0%}")
                if "refused" in row:
                    table.row(*start, row["refused"][:120])
                    continue
                accuracies = percent(*row["accuracy"].values()) or ["", ""]
                cells = percent(row["expected"], *row["time"], *row["macs"])
                table.row(*start, *cells, *accuracies, *percent(row["error"]))


if __name__ == "__main__":
    main()
