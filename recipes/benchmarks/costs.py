"""Two ways to include the cost of a channel in its score: division by it, or subtraction of a multiple of it.

    python recipes/benchmarks/costs.py --init-from resnet20.pt --root DIR --out FILE.json

As in readers.py, a trained ResNet-20 is pruned in one shot by Taylor scores, until a share of its multiply-adds
is removed. The figures are accuracies on the validation images, without any retraining.
"""

from __future__ import annotations

from readers import accuracy, data_and_batches
from shared import Table, add_data, arguments, percent, save

from lightning_prune import Channels, Global, Taylor

SELECTORS = [
    Global(budget="macs"),
    *(Global(budget="macs", cost_weight=weight) for weight in (1e-3, 1e-2, 1e-1, 1.0)),
    Global(budget="macs", normalize="l2"),
    *(Global(budget="macs", normalize="l2", cost_weight=weight) for weight in (1.0, 10.0, 100.0, 1000.0)),
    Global(budget="macs", normalize="cost"),
]


def main() -> None:
    """Print a row for each selector as soon as it is done, and write JSON."""
    parser = arguments(__doc__, "costs.json")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.5])
    add_data(parser, trained=True)
    options = parser.parse_args()
    data, batches = data_and_batches(options)
    table = Table("normalize", "cost_weight", *(f"{100 * each:.0f} %" for each in options.targets))
    rows = []
    for selector in SELECTORS:
        found = [
            accuracy(Taylor(), selector, Channels(), target, data, batches, options.init_from)
            for target in options.targets
        ]
        rows.append({"normalize": selector.normalize, "cost_weight": selector.cost_weight, "accuracy": found})
        table.row(selector.normalize, f"{selector.cost_weight:g}", *percent(*found))
        save(options.out, rows)


if __name__ == "__main__":
    main()
