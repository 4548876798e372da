"""Is every tenth batch enough for activations? Spearman's correlation with scores of all batches.

    python recipes/benchmarks/sampling.py --init-from resnet20.pt --root DIR --batches 90

Scores of channels of a trained ResNet-20, from every k-th of so many training batches of 128 images, against
those from all of them: within each group of channels (the mean over groups), and over the whole network. Passes
are in training mode, without a step of the optimizer, so that a batch that is not looked at need not run.
"""

from __future__ import annotations

from lightning.pytorch import seed_everything
from ranking import row, scores_of
from shared import Table, add_data, arguments, images, training_batches

from lightning_prune import ActivationNorm, ActivationTaylor, APoZ, Wanda

EVERY = (3, 10, 30)


def main() -> None:
    """Prints a row for each criterion."""
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
