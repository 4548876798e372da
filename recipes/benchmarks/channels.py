"""Accuracy of a ResNet-20 with fewer multiply-adds, pruned by lightning_prune and by Torch-Pruning.

    pip install torch-pruning
    python recipes/benchmarks/channels.py --init-from resnet20.pt --root DIR --out FILE.json

All arms have the same initial weights, data, seeds, optimizer and number of epochs. Torch-Pruning removes
channels before the first epoch, until the multiply-adds have reached the target; it takes gradients on ten
batches. lightning_prune ("ours") masks channels by statistics of ordinary training steps: in steps 10 to 60, or
in one shot in step 10, or in step 0 if the criterion needs no gradients. It removes the masked channels at the
end. Multiply-adds are counted on the pruned network. Accuracy is that of the last epoch; the test set is
evaluated once, at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from classifier import Classifier
from data import Images
from lightning.pytorch import Callback, seed_everything
from shared import (
    EXAMPLE,
    Table,
    add_data,
    add_training,
    arguments,
    fit_and_test,
    images,
    loss_of,
    percent,
    quiet_trainer,
    save,
    training_batches,
)
from torch import nn

from lightning_prune import (
    Channels,
    Criterion,
    Cubic,
    Global,
    Magnitude,
    OneShot,
    PruningCallback,
    Random,
    Schedule,
    Taylor,
)
from lightning_prune.channels.graph.mac_counter import macs_by_parameter
from lightning_prune.report.cost import parameters

Arm = Callable[[Classifier, Images, float], list[Callback]]


# Moments are given in steps: as shares of a short fit, all of them would round to the start of one epoch.
GRADUAL = Cubic(start="10st", end="60st", every="10st")


def ours(
    criterion: Criterion,
    normalize: Literal["mean", "cost"] | None = None,
    schedule: Schedule = GRADUAL,
) -> Arm:
    """Return an arm of lightning_prune, which masks channels in training and removes them at the end.

    Args:
        criterion: The criterion.
        normalize: The normalization of the scores of ``Global``.
        schedule: The schedule of pruning events.
    """

    def arm(model: Classifier, data: Images, speedup: float) -> list[Callback]:
        pruning = PruningCallback(
            1 - 1 / speedup,
            criterion=criterion,
            structure=Channels(),
            selector=Global(budget="macs", normalize=normalize),
            schedule=schedule,
            compact=True,
        )
        return [pruning]

    return arm


def theirs(importance: str, whole: bool = True) -> Arm:
    """Return an arm of Torch-Pruning, which removes channels before training.

    Args:
        importance: Name of the class of ``torch_pruning.importance`` that scores the channels.
        whole: Whether channels of the whole network compete; otherwise each layer loses the same share.
    """

    def arm(model: Classifier, data: Images, speedup: float) -> list[Callback]:
        import torch_pruning

        net = model.net
        pruner = torch_pruning.pruner.BasePruner(
            net,
            EXAMPLE,
            importance=getattr(torch_pruning.importance, importance)(),
            global_pruning=whole,
            pruning_ratio=1.0,
            max_pruning_ratio=1.0,
            iterative_steps=400,
            ignored_layers=[net.fc],
        )
        goal = _macs(net) / speedup
        for batch in training_batches(data, 10):
            loss_of(net, batch).backward()
        while _macs(net) > goal:
            pruner.step()
        net.zero_grad()
        net.train()  # Torch-Pruning leaves evaluation mode on, in which batch norm statistics are not updated
        # strided 1x1 convolutions with less than 8 channels crash in channels-last format: oneDNN issue 6035
        net.to(memory_format=torch.contiguous_format)
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
        return []

    return arm


def dense(model: Classifier, data: Images, speedup: float) -> list[Callback]:
    """Return no callback: the arm that is not pruned, whatever the target."""
    return []


ARMS: dict[str, Arm] = {
    "dense, trained on": dense,
    "ours, Taylor, normalize cost": ours(Taylor(), "cost"),
    "ours, Taylor, normalize cost, one shot": ours(Taylor(), "cost", OneShot("10st")),
    "ours, Taylor, normalize mean": ours(Taylor(), "mean"),
    "ours, Taylor": ours(Taylor()),
    "ours, Magnitude L1, normalize mean": ours(Magnitude(p=1), "mean"),
    "ours, Magnitude L1, normalize mean, one shot": ours(Magnitude(p=1), "mean", OneShot("0st")),
    "ours, Magnitude L2, normalize mean": ours(Magnitude(p=2), "mean"),
    "ours, Random": ours(Random()),
    "ours, Random, one shot": ours(Random(), schedule=OneShot("0st")),
    "Torch-Pruning, GroupTaylor": theirs("GroupTaylorImportance"),
    "Torch-Pruning, GroupMagnitude": theirs("GroupMagnitudeImportance"),
    "Torch-Pruning, random, per layer": theirs("RandomImportance", whole=False),
}


def _macs(net: nn.Module) -> int:
    """Return the multiply-adds of a network on the example."""
    return sum(macs_by_parameter(net, EXAMPLE).values())


def run(name: str, speedup: float, seed: int, data: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, train and test one arm with one seed, and return the results.

    Args:
        name: Name of the arm.
        speedup: Multiply-adds of the dense network divided by those of the pruned network, as a target.
        seed: Seed of the run.
        data: The images.
        options: The command line.
    """
    seed_everything(seed, verbose=False)
    model = Classifier(lr=options.lr, init_from=options.init_from)
    dense = _macs(model.net), parameters(model.net)
    begun = time.perf_counter()
    callbacks = ARMS[name](model, data, speedup)
    cutting = time.perf_counter() - begun
    validated, tested, fitting = fit_and_test(model, data, quiet_trainer(options.epochs, callbacks))
    left = _macs(model.net), parameters(model.net)
    return {
        "arm": name,
        "wanted": speedup,
        "speedup": dense[0] / left[0],
        "parameters": left[1],
        "val": validated,
        "test": tested,
        "epochs": options.epochs,
        "images": options.train_size,
        "seed": seed,
        "seconds": cutting + fitting,
    }


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table row of one arm: means over seeds, and the standard deviation of the test accuracy."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    val, test = percent(mean("val"), mean("test"))
    spread = f" +- {100 * statistics.stdev(row['test'] for row in rows):.2f}" if len(rows) > 1 else ""
    figures = [f"{mean('speedup'):.2f}x", f"{mean('parameters'):,.0f}", val, test + spread]
    return [rows[0]["arm"], *figures, f"{mean('seconds'):.0f}"]


def main() -> None:
    """Print a row for each arm as soon as it is done, and write JSON."""
    parser = arguments(__doc__, "channels.json")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    add_data(parser)
    add_training(parser, epochs=3, train_size=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    table = Table("method", "fewer multiply-adds", "parameters", "val", "test", "seconds")
    data = images(options)
    rows: list[dict[str, Any]] = []
    for speedup in options.speedups:
        for name in options.arms:
            runs = []
            for seed in options.seeds:
                runs.append(run(name, speedup, seed, data, options))
                save(options.out, rows + runs)
            rows += runs
            table.row(*cells(runs))


if __name__ == "__main__":
    main()
