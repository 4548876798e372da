"""How well each criterion ranks channels: Spearman's correlation with the oracle, on a trained network.

    python recipes/benchmarks/ranking.py --init-from resnet20.pt --root DIR --out FILE.json --plot FILE.png

The study of Molchanov et al. 2016 (arXiv 1611.06440), on a ResNet-20. The oracle sets each channel to zero, one
at a time, and takes the absolute change of the loss on training images that are reserved for it. Its scores on
the first half of these images are also correlated with those on the second half, which shows how much agreement
any criterion can reach. Criteria gather statistics in forward and backward passes over other training images,
in training mode, without a step of the optimizer; criteria that evaluate the loss use the first of these
images. Correlations are computed within each group of channels (the mean over groups is shown), and over the
whole network: of the scores as they are, and of the scores divided by the l2 norm of their group's scores.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from shared import EXAMPLE, Batch, Table, add_data, arguments, images, loss_of, network, save, training_batches
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_prune import (
    FPGM,
    LAMP,
    ActivationNorm,
    ActivationTaylor,
    APoZ,
    BatchNormScale,
    Channels,
    Criterion,
    Fisher,
    Gradient,
    Losses,
    Magnitude,
    Movement,
    OptimalBrainDamage,
    Oracle,
    Pruner,
    Random,
    Taylor,
    Wanda,
)

Scores = dict[str, Tensor]
CRITERIA: dict[str, Criterion] = {
    "Taylor": Taylor(),
    "Fisher": Fisher(),
    "ActivationTaylor": ActivationTaylor(every=1),
    "OptimalBrainDamage, hutchinson": OptimalBrainDamage(estimator="hutchinson", probes=4),
    "OptimalBrainDamage, fisher": OptimalBrainDamage(estimator="fisher"),
    "ActivationNorm": ActivationNorm(every=1),
    "APoZ": APoZ(every=1),
    "Wanda": Wanda(every=1),
    "Gradient": Gradient(),
    "Movement": Movement(),
    "Magnitude L1": Magnitude(p=1),
    "Magnitude L2": Magnitude(p=2),
    "BatchNormScale": BatchNormScale(),
    "FPGM": FPGM(),
    "LAMP": LAMP(),
    "Random": Random(),
}


def scores_of(criterion: Criterion, weights: str, batches: list[Batch]) -> tuple[Scores, float]:
    """Compute a criterion's scores of the channels of a network.

    Args:
        criterion: The criterion.
        weights: File of the network's weights.
        batches: Training batches for the criterion's statistics, or for the losses that it evaluates.

    Returns:
        The scores, and the seconds that statistics and scores took.
    """
    net = network(weights)
    pruner = Pruner(net, 0.5, criterion=criterion, structure=Channels(), schedule=None, example=EXAMPLE)
    begun = time.perf_counter()
    for number, batch in enumerate(batches):
        if criterion.held or not criterion.needs:
            break
        net.zero_grad()
        with pruner.watch(number):
            loss_of(net, batch).backward()
        pruner.observe()
    found = pruner.scores(
        Losses(loss_of, batches[: criterion.held], progress=False) if criterion.held else None
    )
    return found, time.perf_counter() - begun


def divided(scores: Scores) -> Scores:
    """Return the scores of each group, divided by their l2 norm."""
    return {name: each / each.norm() for name, each in scores.items()}


def correlation(found: Scores, oracle: Scores) -> float:
    """Return Spearman's correlation over all channels of the oracle's groups together."""
    one, other = (torch.cat([scores[name].double() for name in oracle]) for scores in (found, oracle))
    return float(spearman_corrcoef(one, other))


def row(name: str, found: Scores, oracle: Scores, seconds: float) -> dict[str, Any]:
    """Return a criterion's correlations with the oracle.

    Args:
        name: Name of the criterion.
        found: The criterion's scores.
        oracle: The oracle's scores.
        seconds: Seconds that the criterion's scores took.

    Returns:
        "groups": group name to the correlation within the group; "within": the mean of these; "raw": the
        correlation over the whole network; "l2": the same with the criterion's scores divided by the l2 norm of
        their group; "criterion" and "seconds": the arguments.
    """
    groups = {group: correlation(found, {group: oracle[group]}) for group in oracle}
    return {
        "criterion": name,
        "groups": groups,
        "within": statistics.fmean(groups.values()),
        "raw": correlation(found, oracle),
        "l2": correlation(divided(found), oracle),
        "seconds": seconds,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Save a bar chart of the correlations, with three bars for each criterion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    labels = {
        "within": "within groups, mean",
        "raw": "whole network",
        "l2": "whole network, divided by l2 norm",
    }
    for place, (key, label) in enumerate(labels.items()):
        heights = [line + 0.27 * (place - 1) for line in range(len(rows))]
        axes.barh(heights, [each[key] for each in rows], 0.25, label=label)
    axes.set_yticks(range(len(rows)), [each["criterion"] for each in rows])
    axes.invert_yaxis()
    axes.set_xlabel("Spearman's correlation with the oracle")
    axes.axvline(0, color="black", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print a row for each criterion as soon as it is done, write JSON and, with ``--plot``, a plot."""
    parser = arguments(__doc__, "ranking.json")
    add_data(parser, trained=True)
    parser.add_argument("--held", type=int, default=10, help="batches for the oracle")
    parser.add_argument("--seen", type=int, default=40, help="batches for statistics")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    batches = training_batches(images(options), options.held + options.seen)
    held, seen = batches[: options.held], batches[options.held :]
    halves = held[: len(held) // 2], held[len(held) // 2 :]
    (first, _), (second, seconds) = (
        scores_of(Oracle(batches=len(half)), options.init_from, half) for half in halves
    )
    oracle, _ = scores_of(Oracle(batches=len(held)), options.init_from, held)
    table = Table("criterion", "within groups", "network, as they are", "network, over l2 norms", "seconds")
    rows = [row("Oracle, half against half", first, second, seconds)]
    table.row(*cells(rows[0]))
    for name, criterion in CRITERIA.items():
        found, seconds = scores_of(criterion, options.init_from, seen)
        rows.append(row(name, found, oracle, seconds))
        table.row(*cells(rows[-1]))
        save(options.out, rows)
    show_groups(rows)
    if options.plot is not None:
        plot(rows, options.plot)


def cells(found: dict[str, Any]) -> list[str]:
    """Return the table row of one criterion."""
    figures = [f"{found[key]:.2f}" for key in ("within", "raw", "l2")]
    return [found["criterion"], *figures, f"{found['seconds']:.1f}"]


def show_groups(rows: list[dict[str, Any]]) -> None:
    """Print a table of the correlations within groups, with a row per criterion and a column per group."""
    print()
    table = Table("criterion", *rows[0]["groups"])
    for found in rows:
        table.row(found["criterion"], *(f"{each:.2f}" for each in found["groups"].values()))


if __name__ == "__main__":
    main()
