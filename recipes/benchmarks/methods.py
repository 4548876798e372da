"""Accuracy of all methods, each of which prunes one dense ResNet-20 to one size and retrains it for one epoch.

    python recipes/benchmarks/methods.py channels --init-from resnet20.pt --root DIR --out FILE.json
    python recipes/benchmarks/methods.py weights --init-from resnet20.pt --root DIR --out FILE.json

Channels are removed until half of the multiply-adds are removed, or single weights until 90 % of them are. All
arms have the same initial weights, data, seed and optimizer. Unless its name says otherwise, an arm prunes in
one shot before step 10, by the statistics of the steps before. Accuracy is that on the validation images, right
after pruning and at the end; the test set is evaluated once. Seconds are those of the fit, two evaluations on
the validation images included.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from accuracy import Onlooker
from classifier import Classifier
from data import Images
from lightning.pytorch import seed_everything
from shared import Table, add_data, add_training, arguments, fit_and_test, images, percent, quiet_trainer, save

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
    """Return settings of PruningCallback that remove channels with half of the multiply-adds.

    Args:
        criterion: The criterion.
        normalize: The normalization of the scores of ``Global``.
        how: Settings that replace or extend these.
    """
    selector = Global(budget="macs", normalize=normalize)
    settings = {"target": 0.5, "criterion": criterion, "structure": Channels(), "selector": selector}
    return settings | {"schedule": AT_ONCE, "compact": True} | how


def weights(criterion: Criterion, **how: Any) -> dict[str, Any]:
    """Return settings of PruningCallback that remove 90 % of the weights.

    Args:
        criterion: The criterion.
        how: Settings that replace or extend these.
    """
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
    """Train, prune and test with the settings of one arm, and return the results."""
    seed_everything(0, verbose=False)
    model = Classifier(lr=options.lr, init_from=options.init_from)
    pruning = PruningCallback(**settings)
    onlooker = Onlooker(pruning)
    trainer = quiet_trainer(options.epochs, [pruning, onlooker])
    retrained, tested, seconds = fit_and_test(model, data, trainer)
    report = pruning.report
    before = report.dense or report
    return {
        "sparsity": report.sparsity,
        "fewer macs": 1.0 if before.macs is None or report.macs is None else before.macs / report.macs,
        "dense": onlooker.seen[0][1],
        "after pruning": onlooker.seen[-1][1],
        "after retraining": retrained,
        "test": tested,
        "seconds": seconds,
    }


def main() -> None:
    """Print a row for each arm as soon as it is done, and write JSON."""
    parser = arguments(__doc__, "methods.json")
    parser.add_argument("kind", choices=list(ARMS))
    parser.add_argument("--arms", nargs="+", help="some of them; all by default")
    add_data(parser)
    add_training(parser, epochs=1, train_size=15000)
    options = parser.parse_args()
    arms = ARMS[options.kind]
    unknown = set(options.arms or ()) - set(arms)
    if unknown:
        parser.error(f"--arms {', '.join(unknown)}: there are {', '.join(arms)}")
    data = images(options)
    stages = ("after pruning", "after retraining", "test")
    table = Table("method", "removed", "fewer multiply-adds", *stages, "seconds")
    rows = {}
    for name in options.arms or arms:
        rows[name] = found = run(arms[name], data, options)
        accuracies = percent(*(found[stage] for stage in stages))
        sizes = f"{100 * found['sparsity']:.1f} %", f"{found['fewer macs']:.2f}x"
        table.row(name, *sizes, *accuracies, f"{found['seconds']:.0f}")
        save(options.out, rows)


if __name__ == "__main__":
    main()
