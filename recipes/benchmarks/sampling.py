"""Spearman's correlation of activation scores from every 3rd, 10th or 30th batch with those from all batches.

    python recipes/benchmarks/sampling.py --init-from resnet20.pt --root DIR --batches 90

The question is whether every tenth batch, the default, is enough. Channels of a trained ResNet-20 are scored
from every k-th of ``--batches`` training batches of 128 images, and from all of them. Correlations are computed
within each group of channels (the mean over groups is shown), and over the whole network. Passes are in
training mode, without a step of the optimizer, so that batches that are not observed need not run.
"""

from __future__ import annotations

from lightning.pytorch import seed_everything
from ranking import row, scores_of
from shared import Table, add_data, arguments, images, training_batches

from lightning_prune import ActivationNorm, ActivationTaylor, APoZ, Wanda

EVERY = (3, 10, 30)


def main() -> None:
    """Print a row for each criterion."""
    parser = arguments(__doc__)
    add_data(parser, trained=True)
    parser.add_argument("--batches", type=int, default=90, help="training batches between two events")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    batches = training_batches(images(options), options.batches)
    table = Table("criterion", *(f"every {step}, groups / network" for step in EVERY))
    for criterion in (ActivationTaylor(1), ActivationNorm(1), APoZ(1), Wanda(1)):
        full, _ = scores_of(criterion, options.init_from, batches)
        found = []
        for step in EVERY:
            some, seconds = scores_of(criterion, options.init_from, batches[::step])
            agreement = row(repr(criterion), some, full, seconds)
            found.append(f"{agreement['within']:.3f} / {agreement['raw']:.3f}")
        table.row(type(criterion).__name__, *found)


if __name__ == "__main__":
    main()
