"""Accuracy of a ResNet-20 with fewer multiply-adds, side by side with Torch-Pruning.

    pip install torch-pruning
    python recipes/benchmarks/channels.py --init-from resnet20.pt --root DIR --out FILE.json

All arms have the same start, data, seeds, optimizer and number of epochs. Torch-Pruning cuts before the first
epoch, until the multiply-adds are down to the target; its gradients are those of ten batches. Ours masks by
statistics of ordinary training steps, in steps 10 to 60 or in one shot in step 10, or 0 where no gradients are
needed, and cuts at the end. Multiply-adds are counted on the network that is left. Accuracy is that of the
last epoch; the test set is read once, at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from classifier import Classifier
from data import Digits, ImageFolder, Images

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
from lightning_prune.report.cost import macs, parameters

EXAMPLE = torch.zeros(1, 3, 32, 32)
Arm = Callable[[Classifier, Images, float], list[Callback]]


# in steps: of a short fit, all shares would fall on one epoch's start
GRADUAL = Cubic(start="10st", end="60st", every="10st")


def ours(
    criterion: Criterion,
    normalize: Literal["mean", "cost"] | None = None,
    schedule: Schedule = GRADUAL,
) -> Arm:
    """Masks while it trains, cuts at the end."""

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
    """Torch-Pruning in one shot."""

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
        goal = macs(net, EXAMPLE)[""] / speedup
        data.prepare_data()
        data.setup("fit")
        for batch in islice(data.train_dataloader(), 10):
            images, labels = data.on_after_batch_transfer(batch, 0)
            F.cross_entropy(net(images), labels).backward()
        while macs(net, EXAMPLE)[""] > goal:
            pruner.step()
        net.zero_grad()
        net.train()  # it leaves evaluation mode on, in which BatchNorm would learn nothing
        # channels last, strided 1x1 convolutions of less than 8 channels crash: oneDNN issue 6035
        net.to(memory_format=torch.contiguous_format)
        net.register_forward_pre_hook(lambda module, images: (images[0].contiguous(),))
        return []

    return arm


def dense(model: Classifier, data: Images, speedup: float) -> list[Callback]:
    """Nothing is cut, whatever the target."""
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


def run(name: str, speedup: float, seed: int, data: Images, options: argparse.Namespace) -> dict[str, Any]:
    """One arm, once."""
    seed_everything(seed, verbose=False)
    model = Classifier(lr=options.lr, init_from=options.init_from)
    dense = macs(model.net, EXAMPLE)[""], parameters(model.net)
    begun = time.perf_counter()
    callbacks = ARMS[name](model, data, speedup)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    seconds = time.perf_counter() - begun
    validated = float(trainer.callback_metrics["val_acc"])
    (tested,) = trainer.test(model, data, verbose=False)
    left = macs(model.net, EXAMPLE)[""], parameters(model.net)
    return {
        "arm": name,
        "wanted": speedup,
        "speedup": dense[0] / left[0],
        "parameters": left[1],
        "val": validated,
        "test": tested["test_acc"],
        "epochs": options.epochs,
        "images": options.train_size,
        "seed": seed,
        "seconds": seconds,
    }


def line(rows: list[dict[str, Any]]) -> str:
    """One arm's runs, a seed each."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    spread = f" +- {100 * statistics.stdev(row['test'] for row in rows):.2f}" if len(rows) > 1 else ""
    return (
        f"| {rows[0]['arm']} | {mean('speedup'):.2f}x | {mean('parameters'):,.0f} | {100 * mean('val'):.2f}"
        f" | {100 * mean('test'):.2f}{spread} | {mean('seconds'):.0f} |"
    )


def main() -> None:
    """Prints a row for each arm as it comes, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    parser.add_argument("--init-from", help="a dense ResNet-20; without, it starts from scratch")
    parser.add_argument("--root", help="an ImageFolder of CIFAR-10; without, the embedded digits")
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("channels.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    print("| method | fewer multiply-adds | parameters | val | test | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    data = ImageFolder(root=options.root, train_size=options.train_size) if options.root else Digits()
    rows: list[dict[str, Any]] = []
    for speedup in options.speedups:
        for name in options.arms:
            runs = []
            for seed in options.seeds:
                runs.append(run(name, speedup, seed, data, options))
                options.out.write_text(json.dumps(rows + runs, indent=2))
            rows += runs
            print(line(runs), flush=True)


if __name__ == "__main__":
    main()
