"""The command line: LightningCLI with PruningCallback under ``--pruning``, and reports of what it left."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.callback import PruningCallback


class PlanningTrainer(Trainer):
    """A Trainer that can also look ahead."""

    def plan(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Prints what a fit would prune, what stays and why, without training."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PruningCallback):
                print(callback.plan(model, model.example_input_array).table())


class PruningCLI(LightningCLI):
    """LightningCLI whose Trainer has a PruningCallback, configured under ``--pruning``.

    Its subcommands are LightningCLI's, and ``plan``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", PlanningTrainer)
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--pruning``."""
        parser.add_lightning_class_args(PruningCallback, "pruning")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's, and ``plan``."""
        return LightningCLI.subcommands() | {"plan": {"model", "datamodule"}}


def main() -> None:
    """Entry point of ``lightning-prune``: ``fit | plan | ...`` of any class path, and ``report PATH``."""
    PruningCLI()
