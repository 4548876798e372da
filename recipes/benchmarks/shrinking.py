"""Time and peak memory of a fit whose network is cut at each event, beside the dense and the masked network.

    python recipes/benchmarks/shrinking.py --networks resnet20 --epochs 30 --out FILE.json
    python recipes/benchmarks/shrinking.py --networks vgg16_bn --epochs 9 --out FILE.json

In the first third of the fit the network loses two thirds of its multiply-adds, in three events. The fit goes
on as it is ("dense"), with masks ("masked", ``compact=False``) or with a smaller network ("each",
``compact="each"``). Each arm runs in a process of its own, one after the other, round by round. Time is that of
the processor, on one thread, of all of ``trainer.fit``: analysis, events, proofs and the last report, without
validation and measurements of latency. "Last step" is the median time of the training steps of the last
epoch. Memory is what the fit adds at its peak.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from typing import Any, Literal

import torch
from classifier import Classifier
from lightning.pytorch import Callback, seed_everything
from resident import apart, forget_peak, give_back_freed, peak, resident
from shared import Table, add_data, add_training, arguments, images, quiet_trainer, save

from lightning_prune import Channels, Cubic, Global, Magnitude, PruningCallback

ARMS: dict[str, bool | Literal["each"] | None] = {"dense": None, "masked": False, "each": "each"}
SCHEDULE = Cubic(start="0%", end="33%", every="11%")


class StepTimes(Callback):
    """Notes the processor time of each training step.

    Attributes:
        seconds: The seconds of each step.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock; a callback that prunes comes before this one."""
        self._begun = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time of the step."""
        self.seconds.append(time.process_time() - self._begun)


def pruning(compact: bool | Literal["each"]) -> PruningCallback:
    """Return the callback of an arm: three times fewer multiply-adds, as its schedule says."""
    return PruningCallback(
        2 / 3,
        criterion=Magnitude(),
        # in the channels-last layout strided 1x1 convolutions need 8 channels: oneDNN issue 6035
        structure=Channels(minimum=8),
        selector=Global(budget="macs", normalize="mean"),
        schedule=SCHEDULE,
        compact=compact,
        measure_seconds=0,
        write_report=False,
    )


def fit(arm: str, name: Any, options: Namespace) -> dict[str, Any]:
    """Return what the fit of an arm takes, and its last loss."""
    torch.set_num_threads(1)
    give_back_freed()
    seed_everything(0, verbose=False)
    data = images(options)
    data.prepare_data()
    data.setup("fit")
    model = Classifier(name, lr=options.lr, init_from=options.init_from)
    compact = ARMS[arm]
    steps = StepTimes()
    trainer = quiet_trainer(options.epochs, [steps] if compact is None else [pruning(compact), steps])
    trainer.limit_val_batches = 0
    if options.batches is not None:
        trainer.limit_train_batches = options.batches
    before = resident()
    forget_peak()
    begun = time.process_time()
    trainer.fit(model, data)
    taken = time.process_time() - begun
    return {
        "seconds": taken,
        "last step": statistics.median(steps.seconds[-int(trainer.num_training_batches) :]),
        "bytes": peak() - before,
        "loss": float(trainer.callback_metrics["train_loss"]),
    }


def main() -> None:
    """Print a table and write JSON."""
    parser = arguments(__doc__, "shrinking.json")
    add_data(parser)
    add_training(parser, epochs=30, train_size=None)
    parser.add_argument("--batches", type=int, help="training batches an epoch; all by default")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg16_bn"])
    pruned = [arm for arm in ARMS if arm != "dense"]
    parser.add_argument("--arms", nargs="+", default=pruned, choices=pruned, help="beside the dense one")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    table = Table(
        "network", "arm", "time", "of dense", "last step", "of dense", "peak memory", "of dense", "last loss"
    )
    rows = []
    for name in options.networks:
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ("dense", *options.arms)}
        for _ in range(options.rounds):
            for arm, fits in found.items():
                fits.append(apart(fit, arm, name, options))
                rows.append({"network": name, "arm": arm, **fits[-1]})
                save(options.out, rows)
        for arm, fits in found.items():
            middle = {key: statistics.median(each[key] for each in fits) for key in fits[0]}
            of_dense = {
                key: statistics.median(
                    one[key] / other[key] for one, other in zip(fits, found["dense"], strict=True)
                )
                for key in ("seconds", "last step", "bytes")
            }
            table.row(
                *(name, arm, f"{middle['seconds']:.0f} s", f"{of_dense['seconds']:.2f}"),
                *(f"{1000 * middle['last step']:.0f} ms", f"{of_dense['last step']:.2f}"),
                *(f"{middle['bytes'] / 2**20:.0f} MiB", f"{of_dense['bytes']:.2f}"),
                f"{middle['loss']:.4f}",
            )


if __name__ == "__main__":
    main()
