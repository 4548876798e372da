"""Prunes a trained network at once, and reconstructs it without training: accuracy on the validation images.

    python recipes/benchmarks/reconstruction.py --init-from resnet20.pt --root DIR --figure FILE.png

Each row prunes the trained network anew. Beside the network as masked stand the same one with the statistics
of its batch norms taken anew on the calibration images, and the reconstructed one. Labels are used for the
scores of channels alone. Where Torch-Pruning is installed, it cuts channels to the same multiply-adds, with
group Taylor scores of the same images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from shared import (
    EXAMPLE,
    Batch,
    Table,
    add_data,
    arguments,
    calibration_and_validation,
    loss_of,
    network,
    percent,
    save,
)
from torch import nn

from lightning_prune import Channels, Global, NofM, OptimalBrainSurgeon, PerLayer, Pruner, Reconstruct, Taylor
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.statistics.observer import Needs

_SPEEDUPS = (1.5, 2.1, 3, 4)
_SURGEON = OptimalBrainSurgeon()
_LEAST = Reconstruct()
ROWS: dict[str, dict[str, Any]] = {
    "single weights, magnitude, 90 %": {"target": 0.9},
    "single weights, magnitude, 95 %": {"target": 0.95},
    "single weights, magnitude, 98 %": {"target": 0.98},
    "single weights, OptimalBrainSurgeon, 90 %": {
        "target": 0.9,
        "criterion": _SURGEON,
        "selector": PerLayer(),
    },
    "2:4, magnitude": {"selector": NofM(2, 4)},
    "2:4, OptimalBrainSurgeon": {"selector": NofM(2, 4), "criterion": _SURGEON},
}


def by_taylor(speedup: float) -> dict[str, Any]:
    """Return the arguments of a pruner of channels by Taylor over cost.

    Args:
        speedup: Multiply-adds of the dense network divided by those of the pruned one.
    """
    selector = Global(budget="macs", normalize="cost")
    return {"target": 1 - 1 / speedup, "structure": Channels(), "criterion": Taylor(), "selector": selector}


def main() -> None:
    """Prune in each way, and print and save the accuracies."""
    parser = arguments(__doc__ or "", out="reconstruction.json")
    add_data(parser, trained=True)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="decides which training images are used")
    parser.add_argument("--figure", type=Path, help="a PNG of accuracy against multiply-adds to write")
    options = parser.parse_args()
    batches, held = calibration_and_validation(options, options.seed)
    inputs = [each for each, _ in batches]
    dense = network(options.init_from).eval()
    print(f"dense: {percent(accuracy(dense, held))[0]}")
    table = Table("pruned at once", "as masked", "statistics anew", "reconstructed", "seconds")
    results = []
    rows = {
        f"channels, Taylor over cost, {each} times fewer multiply-adds": by_taylor(each) for each in _SPEEDUPS
    }
    for name, parts in {**rows, **ROWS}.items():
        masked, better = copy.deepcopy(dense), copy.deepcopy(dense)
        ready(masked, parts, batches).prune(1.0, batches=inputs)
        pruner = ready(better, parts, batches)
        begun = time.perf_counter()
        pruner.prune(1.0, reconstruct=_LEAST, batches=inputs)
        seconds = time.perf_counter() - begun
        found = [accuracy(each, held) for each in (masked, with_statistics(masked, batches), better)]
        table.row(name, *percent(*found), f"{seconds:.1f}")
        results.append({"name": name, "accuracies": found, "seconds": seconds})
    if find_spec("torch_pruning") is not None:
        for speedup in _SPEEDUPS:
            cut = cut_by_peer(copy.deepcopy(dense), batches, speedup)
            found = [accuracy(each, held) for each in (cut, with_statistics(cut, batches))]
            name = f"Torch-Pruning, group Taylor, {speedup} times fewer multiply-adds"
            table.row(name, *percent(*found), "", "")
            results.append({"name": name, "accuracies": found})
    save(options.out, results)
    if options.figure is not None:
        draw(results, accuracy(dense, held), options.figure)


def cut_by_peer(model: nn.Module, batches: Sequence[Batch], speedup: float) -> nn.Module:
    """Return a network that Torch-Pruning has cut to a number of multiply-adds.

    Args:
        model: The network, which is changed.
        batches: The batches to take gradients on.
        speedup: Multiply-adds of the dense network divided by those of the pruned one.
    """
    import torch_pruning

    model.to(memory_format=torch.contiguous_format)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        EXAMPLE,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[model.fc],
    )
    goal = sum(macs_by_parameter(model, EXAMPLE).values()) / speedup
    for batch in batches:
        loss_of(model, batch).backward()
    while sum(macs_by_parameter(model, EXAMPLE).values()) > goal:
        pruner.step()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    return model.eval()


def draw(results: Sequence[Mapping[str, Any]], dense: float, path: Path) -> None:
    """Draw accuracy against multiply-adds.

    Args:
        results: The rows.
        dense: Accuracy of the dense network.
        path: The file to write.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    lines = {
        "reconstructed": ("channels", 2),
        "ours, statistics anew": ("channels", 1),
        "Torch-Pruning, statistics anew": ("Torch-Pruning", 1),
        "Torch-Pruning, as cut": ("Torch-Pruning", 0),
    }
    for label, (start, column) in lines.items():
        found = [each["accuracies"][column] for each in results if each["name"].startswith(start)]
        if found:
            shares = [100 / speedup for speedup in _SPEEDUPS]
            axes.plot([100, *shares], [100 * dense, *(100 * each for each in found)], marker="o", label=label)
    axes.set(xlabel="multiply-adds left, %", ylabel="validation accuracy, %", title="ResNet-20, no training")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


def ready(model: nn.Module, parts: Mapping[str, Any], batches: Sequence[Batch]) -> Pruner:
    """Return a pruner that has the gradients it needs.

    Args:
        model: The model, in evaluation mode.
        parts: Arguments of the pruner.
        batches: The batches to take gradients on.
    """
    pruner = Pruner(model, schedule=None, example=batches[0][0][:2], **parts)
    if Needs.GRADIENT in pruner.needs:
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch).backward()
            pruner.observe()
    model.zero_grad()
    return pruner


@torch.no_grad()
def with_statistics(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Return a copy of a model with the statistics of its batch norms taken anew, as means over batches."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    twin.train()
    for inputs, _ in batches:
        twin(inputs)
    return twin.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of images that a model classifies rightly."""
    hits = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return hits / sum(len(labels) for _, labels in batches)


if __name__ == "__main__":
    main()
