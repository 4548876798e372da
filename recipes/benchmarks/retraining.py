"""Accuracy after retraining: with and without reconstruction, with and without a dense teacher, and peers.

    pip install torch-pruning
    python recipes/benchmarks/retraining.py --init-from resnet20.pt --root DIR --epochs 1 3 --seeds 0 1 2

All arms have the same initial weights, data, seeds, optimizer and number of epochs. Channels ("2.1x": fewer
multiply-adds) are cut before the first epoch, with scores of 1,024 training images, by Torch-Pruning and by
"Taylor"; "in steps": masked by ordinary training steps 10 to 60, and cut at the end; "gradually": from step 10
to the peak of the learning rate. Single weights ("90 %") and 2:4 are masked before training step 10;
"gradually": from that step to half of the fit. "Reconstructed": with Reconstruct, on 1,024 images.
"Distilled": with the dense network as the teacher. The accuracy "at once" is that on the validation images
before the first epoch; the others are those after the last one, and the test set is evaluated once, at the
end. Runs that the JSON file has already are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from classifier import Classifier
from data import Images
from lightning.pytorch import Callback, seed_everything
from reconstruction import by_taylor, cut_by_peer, ready
from shared import (
    EXAMPLE,
    Batch,
    Table,
    add_data,
    add_training,
    arguments,
    fit_and_test,
    images,
    percent,
    quiet_trainer,
    save,
    training_batches,
)

from lightning_prune import (
    Cubic,
    Distillation,
    Global,
    Magnitude,
    NofM,
    OneShot,
    PruningCallback,
    Random,
    Reconstruct,
    Schedule,
    Selector,
    compact,
)
from lightning_prune.channels.graph.mac_counter import macs_by_parameter

Arm = Callable[[Classifier, list[Batch]], list[Callback]]

_BATCHES = 8
_IN_STEPS = Cubic(start="10st", end="60st", every="10st")
_TO_THE_PEAK = Cubic(start="10st", end="30%", every="20st")
_AT_STEP_10 = OneShot("10st")
_GRADUALLY = Cubic(start="10st", end="50%", every="20st")


def dense(model: Classifier, batches: list[Batch]) -> list[Callback]:
    """Return no callback: the arm that is not pruned."""
    return []


def cut(speedup: float, reconstruct: Reconstruct | None = None) -> Arm:
    """Return an arm that removes channels before training.

    Args:
        speedup: Multiply-adds of the dense network divided by those of the pruned one.
        reconstruct: How to reconstruct; ``None`` not to.
    """

    def arm(model: Classifier, batches: list[Batch]) -> list[Callback]:
        pruner = ready(model.net.eval(), by_taylor(speedup), batches)
        model.net.train()  # for the batch norms, which will be trained
        pruner.prune(1.0, reconstruct=reconstruct, batches=[inputs for inputs, _ in batches])
        model.net = compact(model.net, pruner.masks, EXAMPLE).train()
        return []

    return arm


def in_steps(speedup: float, schedule: Schedule = _IN_STEPS) -> Arm:
    """Return an arm that masks channels in training, step by step, and removes them at the end."""

    def arm(model: Classifier, batches: list[Batch]) -> list[Callback]:
        return [PruningCallback(**by_taylor(speedup), schedule=schedule, compact=True)]

    return arm


def cut_by_torch_pruning(speedup: float) -> Arm:
    """Return an arm in which Torch-Pruning removes channels before training."""

    def arm(model: Classifier, batches: list[Batch]) -> list[Callback]:
        cut_by_peer(model.net, batches, speedup).train()
        model.net.zero_grad()
        return []

    return arm


def masked(target: float | None, selector: Selector, **parts: Any) -> Arm:
    """Return an arm that masks single weights before training step 10.

    Args:
        target: Share of the weights to remove; ``None`` if the selector says it.
        selector: The selector.
        parts: Other arguments of the callback.
    """

    def arm(model: Classifier, batches: list[Batch]) -> list[Callback]:
        return [PruningCallback(target, selector=selector, **{"schedule": _AT_STEP_10, **parts})]

    return arm


def distilled(arm: Arm) -> Arm:
    """Return an arm in which the dense network teaches the pruned one, too."""

    def taught(model: Classifier, batches: list[Batch]) -> list[Callback]:
        teacher = copy.deepcopy(model)  # before it is cut
        return [Distillation(teacher), *arm(model, batches)]

    return taught


def of_channels(speedup: float) -> dict[str, Arm]:
    """Return the arms for channels by name."""
    return {
        "Taylor": cut(speedup),
        "Taylor, in steps": in_steps(speedup),
        "Taylor, reconstructed": cut(speedup, Reconstruct()),
        "Taylor, distilled": distilled(cut(speedup)),
        "Taylor, in steps, distilled": distilled(in_steps(speedup)),
        "Taylor, gradually, distilled": distilled(in_steps(speedup, _TO_THE_PEAK)),
        "Taylor, reconstructed, distilled": distilled(cut(speedup, Reconstruct())),
        "Torch-Pruning": cut_by_torch_pruning(speedup),
        "Torch-Pruning, distilled": distilled(cut_by_torch_pruning(speedup)),
    }


def of_weights(target: float | None, selector: Selector) -> dict[str, Arm]:
    """Return the arms for single weights by name."""
    at_once = masked(target, selector, criterion=Magnitude())
    reconstructed = masked(target, selector, criterion=Magnitude(), reconstruct=Reconstruct())
    gradually = masked(target, selector, criterion=Magnitude(), schedule=_GRADUALLY)
    return {
        "Magnitude": at_once,
        "Magnitude, gradually": gradually,
        "Magnitude, reconstructed": reconstructed,
        "Magnitude, distilled": distilled(at_once),
        "Magnitude, gradually, distilled": distilled(gradually),
        "Magnitude, reconstructed, distilled": distilled(reconstructed),
        "Random": masked(target, selector, criterion=Random()),
    }


ARMS: Mapping[str, Mapping[str, Arm]] = {
    "dense": {"trained on": dense},
    "2.1x": of_channels(2.1),
    "3x": of_channels(3),
    "4x": of_channels(4),
    "90 %": of_weights(0.9, Global()),
    "95 %": of_weights(0.95, Global()),
    "98 %": of_weights(0.98, Global()),
    "2:4": of_weights(None, NofM(2, 4)),
}


def run(arm: Arm, epochs: int, seed: int, data: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, train and test one arm with one seed, and return the results.

    Args:
        arm: The arm.
        epochs: Number of epochs.
        seed: Seed of the run.
        data: The images.
        options: The command line.
    """
    seed_everything(seed, verbose=False)
    model = Classifier(lr=options.lr, init_from=options.init_from)
    before = sum(macs_by_parameter(model.net, EXAMPLE).values())
    callbacks = arm(model, training_batches(data, _BATCHES))
    seed_everything(seed, verbose=False)  # the same order of images, whatever the arm has drawn
    trainer = quiet_trainer(epochs, callbacks, options.precision)
    cut_already = not any(isinstance(each, PruningCallback) for each in callbacks)
    at_once = trainer.validate(model, data, verbose=False)[0]["val_acc"] if cut_already else None
    validated, tested, seconds = fit_and_test(model, data, trainer)
    return {
        "at once": at_once,
        "val": validated,
        "test": tested,
        "speedup": before / sum(macs_by_parameter(model.net, EXAMPLE).values()),
        "seconds": seconds,
    }


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns of one arm: means over seeds, and the standard deviation of the test accuracy."""
    at_once, val, test = ([row[key] for row in rows] for key in ("at once", "val", "test"))
    first = [] if None in at_once else percent(statistics.fmean(at_once))
    means = percent(statistics.fmean(val), statistics.fmean(test))
    spread = f" ± {100 * statistics.stdev(test):.2f}" if len(test) > 1 else ""
    return ["".join(first), means[0], means[1] + spread, str(len(rows))]


def main() -> None:
    """Run what the JSON file lacks, and print the table of all that it has."""
    parser = arguments(__doc__ or "", "retraining.json")
    parser.add_argument("--budgets", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", default=[], help="some arms; by default all of each budget")
    add_data(parser, trained=True)
    add_training(parser, epochs=[1, 3], train_size=None)
    parser.add_argument("--precision", default="32-true", help="the Trainer's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    data = images(options)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    keys = [
        {"budget": budget, "arm": arm, "epochs": epochs, "precision": options.precision}
        for epochs in options.epochs
        for budget in options.budgets
        for arm in ARMS[budget]
        if not options.arms or arm in options.arms
    ]
    for seed in options.seeds:
        for key in keys:
            found = key | {"seed": seed}
            if not any(found.items() <= row.items() for row in rows):
                rows.append(found | run(ARMS[key["budget"]][key["arm"]], key["epochs"], seed, data, options))
                save(options.out, rows)
    table = Table("budget", "method", "epochs", "at once", "val", "test", "seeds")
    for key in keys:
        runs = [row for row in rows if key.items() <= row.items()]
        table.row(key["budget"], key["arm"], key["epochs"], *cells(runs))


if __name__ == "__main__":
    main()
