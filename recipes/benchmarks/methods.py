"""Every method, from one dense ResNet-20 to one size, after one epoch of retraining.

    python recipes/benchmarks/methods.py channels --init-from resnet20.pt --root DIR --out FILE.json
    python recipes/benchmarks/methods.py weights --init-from resnet20.pt --root DIR --out FILE.json

Channels go until half of the multiply-adds are gone, single weights until 90 % of them are. All arms have the
same start, data, seed and optimizer, and prune at once before step 10, on what the steps before have shown, but
for those that say otherwise. Accuracy is on the validation images, right after pruning and at the end; the test
set is read once. Seconds are those of the fit with two looks at the validation images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))

from accuracy import Onlooker
from classifier import Classifier
from data import Digits, ImageFolder, Images

from lightning_prune import (
    FPGM,
    LAMP,
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    BatchNormScale,
    Blocks,
    Channels,
    Criterion,
    Cubic,
    Fisher,
    Global,
    Gradient,
    Magnitude,
    Movement,
    NofM,
    OneShot,
    OptimalBrainDamage,
    Oracle,
    ParticleFilter,
    PerLayer,
    PruningCallback,
    Random,
    Rewind,
    Taylor,
    Threshold,
    Wanda,
)

AT_ONCE = OneShot("10st")
GRADUAL = Cubic(start="10st", end="60st", every="10st")


def channels(
    criterion: Criterion, normalize: Literal["l2", "mean", "max", "cost"] | None = None, **how: Any
) -> dict[str, Any]:
    """Half of the multiply-adds."""
    selector = Global(budget="macs", normalize=normalize)
    settings = {"target": 0.5, "criterion": criterion, "structure": Channels(), "selector": selector}
    return settings | {"schedule": AT_ONCE, "compact": True} | how


def weights(criterion: Criterion, **how: Any) -> dict[str, Any]:
    """90 % of the weights."""
    return {"target": 0.9, "criterion": criterion, "schedule": AT_ONCE} | how


SIGNS = OptimalBrainDamage(estimator="hutchinson", batches=4, probes=4)
BY_COST = Global(budget="macs", normalize="cost")
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "channels": {
        "Taylor, cost": channels(Taylor(), "cost"),
        "Taylor, cost, in steps 10 to 60": channels(Taylor(), "cost", schedule=GRADUAL),
        "Taylor, l2": channels(Taylor(), "l2"),
        "Fisher, cost": channels(Fisher(), "cost"),
        "Fisher, l2": channels(Fisher(), "l2"),
        "ActivationTaylor, cost": channels(ActivationTaylor(every=1), "cost"),
        "ActivationTaylor, l2": channels(ActivationTaylor(every=1), "l2"),
        "OptimalBrainDamage, hutchinson, cost": channels(SIGNS, "cost"),
        "OptimalBrainDamage, fisher, cost": channels(OptimalBrainDamage(), "cost"),
        "Oracle, cost": channels(Oracle(batches=2), "cost"),
        "ParticleFilter of Taylor, cost": channels(Taylor(), selector=ParticleFilter(BY_COST, batches=2)),
        "Magnitude L1, cost": channels(Magnitude(), "cost"),
        "Magnitude L1, mean": channels(Magnitude(), "mean"),
        "Magnitude L2, cost": channels(Magnitude(p=2), "cost"),
        "BatchNormScale, cost": channels(BatchNormScale(l1=1e-4), "cost"),
        "FPGM, cost": channels(FPGM(), "cost"),
        "LAMP, cost": channels(LAMP(), "cost"),
        "ActivationNorm, cost": channels(ActivationNorm(every=1), "cost"),
        "APoZ, cost": channels(APoZ(every=1), "cost"),
        "Wanda, cost": channels(Wanda(every=1), "cost"),
        "Gradient, cost": channels(Gradient(), "cost"),
        "Movement, cost": channels(Movement(), "cost"),
        "Random": channels(Random()),
        "Taylor, cost, then from scratch": channels(Taylor(), "cost", rewind=Rewind("random")),
    },
    "weights": {
        "Magnitude": weights(Magnitude()),
        "Magnitude, in steps 10 to 60": weights(Magnitude(), schedule=GRADUAL),
        "Magnitude, per layer": weights(Magnitude(), selector=PerLayer()),
        "LAMP": weights(LAMP()),
        "Taylor": weights(Taylor()),
        "Fisher": weights(Fisher()),
        "Movement": weights(Movement()),
        "Gradient": weights(Gradient()),
        "Wanda": weights(Wanda(every=1)),
        "ActivationTaylor, l2": weights(ActivationTaylor(every=1), selector=Global(normalize="l2")),
        "OptimalBrainDamage, hutchinson": weights(SIGNS),
        "OptimalBrainDamage, fisher": weights(OptimalBrainDamage()),
        "ParticleFilter of Magnitude": weights(Magnitude(), selector=ParticleFilter(batches=2)),
        "Magnitude, learning rate rewound": weights(Magnitude(), rewind=Rewind(weights=False)),
        "Magnitude, weights rewound to step 5": weights(Magnitude(), rewind=Rewind("5st")),
        "Random": weights(Random()),
        "Blocks of 1 x 4, Magnitude": weights(Magnitude(), structure=Blocks(1, 4)),
        "2:4, Magnitude (50 %)": weights(Magnitude(), selector=NofM(2, 4), target=None),
        "Threshold of one deviation": weights(Magnitude(), selector=Threshold(std=1.0), target=None),
    },
}


def run(settings: dict[str, Any], data: Images, options: argparse.Namespace) -> dict[str, Any]:
    """One arm."""
    seed_everything(0, verbose=False)
    model = Classifier(lr=options.lr, init_from=options.init_from)
    pruning = PruningCallback(**settings)
    onlooker = Onlooker(pruning)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning, onlooker],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begun
    retrained = float(trainer.callback_metrics["val_acc"])
    (tested,) = trainer.test(model, data, verbose=False)
    report = pruning.report
    before = report.dense or report
    return {
        "sparsity": report.sparsity,
        "fewer macs": 1.0 if before.macs is None or report.macs is None else before.macs / report.macs,
        "dense": onlooker.seen[0][1],
        "after pruning": onlooker.seen[-1][1],
        "after retraining": retrained,
        "test": tested["test_acc"],
        "seconds": seconds,
    }


def main() -> None:
    """Prints a row for each arm as it comes, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="some of them; all by default")
    parser.add_argument("--init-from", help="a dense ResNet-20; without, it starts from scratch")
    parser.add_argument("--root", help="an ImageFolder of CIFAR-10; without, the embedded digits")
    parser.add_argument("--train-size", type=int, default=15000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    options = parser.parse_args()
    arms = ARMS[options.kind]
    unknown = set(options.arms or ()) - set(arms)
    if unknown:
        parser.error(f"--arms {', '.join(unknown)}: there are {', '.join(arms)}")
    warnings.filterwarnings("ignore", module="lightning")
    train_size = options.train_size
    data = ImageFolder(root=options.root, train_size=train_size) if options.root else Digits()
    print("| method | removed | fewer multiply-adds | after pruning | after retraining | test | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    for name in options.arms or arms:
        rows[name] = found = run(arms[name], data, options)
        accuracies = " | ".join(
            f"{100 * found[key]:.2f}" for key in ("after pruning", "after retraining", "test")
        )
        print(
            f"| {name} | {100 * found['sparsity']:.1f} % | {found['fewer macs']:.2f}x | {accuracies}"
            f" | {found['seconds']:.0f} |",
            flush=True,
        )
        options.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
