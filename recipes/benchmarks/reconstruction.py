"""Prunes a trained network at once, and reconstructs it without training: accuracy on the validation images.

    python recipes/benchmarks/reconstruction.py --init-from resnet20.pt --root DIR --out FILE.json

Each row prunes the trained network anew. Beside the network as masked stand the same one with the statistics
of its batch norms taken anew on the calibration images, and the reconstructed one. Labels are used for the
scores of channels alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from shared import Batch, Table, add_data, arguments, images, loss_of, network, percent, save, training_batches
from torch import nn

from lightning_prune import Channels, Global, NofM, Pruner, Reconstruct, Taylor

_CHANNELS: dict[str, Any] = {
    "structure": Channels(),
    "criterion": Taylor(),
    "selector": Global(budget="macs", normalize="cost"),
}
ROWS: dict[str, dict[str, Any]] = {
    "channels, Taylor over cost, 2.1 times fewer multiply-adds": {"target": 1 - 1 / 2.1, **_CHANNELS},
    "channels, 3 times fewer": {"target": 1 - 1 / 3, **_CHANNELS},
    "single weights, magnitude, 90 %": {"target": 0.9},
    "single weights, magnitude, 95 %": {"target": 0.95},
    "2:4, magnitude": {"selector": NofM(2, 4)},
}


def main() -> None:
    """Prune in each way, and print and save the accuracies."""
    parser = arguments(__doc__ or "", out="reconstruction.json")
    add_data(parser, trained=True)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    data = images(options)
    data.augment = False
    torch.manual_seed(0)
    batches = training_batches(data, options.batches)
    dense = network(options.init_from).eval()
    held = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    print(f"dense: {percent(accuracy(dense, held))[0]}")
    table = Table("pruned at once", "as masked", "statistics anew", "reconstructed", "seconds")
    results = []
    for name, parts in ROWS.items():
        masked = copy.deepcopy(dense)
        prune(masked, parts, batches, None)
        better = copy.deepcopy(dense)
        seconds = prune(better, parts, batches, Reconstruct())
        found = [accuracy(each, held) for each in (masked, with_statistics(masked, batches), better)]
        table.row(name, *percent(*found), f"{seconds:.1f}")
        results.append({"name": name, "accuracies": found, "seconds": seconds})
    save(options.out, results)


def prune(
    model: nn.Module, parts: Mapping[str, Any], batches: Sequence[Batch], reconstruct: Reconstruct | None
) -> float:
    """Prune a model at once.

    Args:
        model: The model, in evaluation mode.
        parts: Arguments of the pruner.
        batches: The batches to take gradients on, and to reconstruct on.
        reconstruct: How to reconstruct; ``None`` not to.

    Returns:
        Seconds of the event: selection, masks and reconstruction.
    """
    pruner = Pruner(model, schedule=None, example=batches[0][0][:2], **parts)
    if "criterion" in parts:
        for batch in batches:
            model.zero_grad()
            loss_of(model, batch).backward()
            pruner.observe()
    inputs = [batch[0] for batch in batches]
    begun = time.perf_counter()
    pruner.prune(1.0, reconstruct=reconstruct, batches=inputs if reconstruct else ())
    return time.perf_counter() - begun


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
