"""Accuracy before pruning, right after it and after retraining, for several criteria at one budget.

    python recipes/benchmarks/accuracy.py --criteria Gradient Magnitude Random --out FILE.json -- \
        --config recipes/differential.yaml --data ImageFolder --data.root DIR --model.init_from PATH

The arguments after ``--`` are passed to the recipe's command line, once for each criterion. All arms have the
same initial weights, data, seed and number of epochs. Accuracy during the fit is that on the validation images;
the test set is evaluated once, at the end.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from classifier import Classifier
from data import Images
from lightning.pytorch import Callback, LightningModule, Trainer
from shared import Table, arguments, percent, save

from lightning_prune import PruningCallback
from lightning_prune.cli import PruningCLI


class Onlooker(Callback):
    """Evaluates the model before the first batch and right after each pruning event, without changing the fit.

    Args:
        pruning: The callback that prunes.

    Attributes:
        seen: Sparsity of the masked weights and accuracy on the validation images, in the order of evaluation.
    """

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Append sparsity and accuracy to ``seen`` if the sparsity has changed."""
        masks = self.pruning.masks.values()
        removed = sum(int((~mask).sum()) for mask in masks)
        sparsity = removed / sum(mask.numel() for mask in masks)
        if self.seen and self.seen[-1][0] == sparsity:
            return
        pl_module.eval()
        hits = total = 0
        with torch.no_grad():
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            for images, labels in loader:
                trainer.training, training = False, trainer.training
                batch = trainer.datamodule.on_after_batch_transfer(  # type: ignore[attr-defined]
                    [each.to(pl_module.device) for each in (images, labels)], 0
                )
                trainer.training = training
                hits += int((pl_module(batch[0]).argmax(1) == batch[1]).sum())
                total += len(labels)
        pl_module.train()
        self.seen.append((sparsity, hits / total))


def run(criterion: str, recipe: list[str]) -> dict[str, Any]:
    """Train, prune and test with one criterion, and return the results.

    Args:
        criterion: Name of the criterion.
        recipe: Arguments of the recipe's command line.
    """
    cli = PruningCLI(
        Classifier,
        Images,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[*recipe, f"--pruning.criterion={criterion}", "--trainer.logger=false"],
    )
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    pruning = next(each for each in callbacks if isinstance(each, PruningCallback))
    onlooker = Onlooker(pruning)
    callbacks.append(onlooker)
    begun = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - begun
    report = pruning.report
    tested = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return {
        "criterion": criterion,
        "removed": report.removed,
        "size": report.size,
        "before": onlooker.seen[0][1],
        "after_pruning": onlooker.seen[-1][1],
        "after_retraining": report.pruned_metric,
        "test": tested[0]["test_acc"],
        "epochs": cli.trainer.max_epochs,
        "seconds": seconds,
    }


def main() -> None:
    """Run all arms, print a table and write JSON."""
    parser = arguments(__doc__, "accuracy.json")
    parser.add_argument("--criteria", nargs="+", default=["Gradient", "Magnitude", "Random"])
    options, recipe = parser.parse_known_args()
    arms = [run(criterion, [each for each in recipe if each != "--"]) for criterion in options.criteria]
    save(options.out, arms)
    table = Table("criterion", "removed", "val before", "val after pruning", "val after retraining", "test")
    for arm in arms:
        figures = percent(*(arm[name] for name in ("before", "after_pruning", "after_retraining", "test")))
        table.row(arm["criterion"], f"{arm['removed']:,} of {arm['size']:,}", *figures)


if __name__ == "__main__":
    main()
