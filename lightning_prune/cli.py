"""The command line: LightningCLI with PruningCallback under ``--pruning``, and reports of what it left."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.callback import PruningCallback


class PruningTrainer(Trainer):
    """A Trainer that can also look ahead, and back."""

    def plan(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Prints what a fit would prune, what stays and why, without training."""
        for callback in self._pruning():
            print(callback.plan(model, model.example_input_array).table())

    def report(
        self, model: LightningModule, ckpt_path: str, datamodule: LightningDataModule | None = None
    ) -> None:
        """Prints the report of a checkpoint.

        Args:
            model: Of the class that was trained.
            ckpt_path: A checkpoint of a fit with a PruningCallback.
            datamodule: Not used.

        Raises:
            ValueError: If the checkpoint has no pruning state.
        """
        checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        for callback in self._pruning():
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state is None:
                raise ValueError(f"ckpt_path={ckpt_path!r} holds no state of {callback.state_key}.")
            callback.load_state_dict(state)
            callback.bind(model)
            print(callback.report.table())

    def _pruning(self) -> list[PruningCallback]:
        callbacks = self.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, PruningCallback)]


class PruningCLI(LightningCLI):
    """LightningCLI whose Trainer has a PruningCallback, configured under ``--pruning``.

    Its subcommands are LightningCLI's, ``plan`` and ``report``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", PruningTrainer)
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--pruning``."""
        parser.add_lightning_class_args(PruningCallback, "pruning")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's, ``plan`` and ``report``."""
        ours = {"model", "datamodule"}
        return LightningCLI.subcommands() | {"plan": ours, "report": ours}


def main() -> None:
    """Entry point of ``lightning-prune``: any LightningModule and data module, by class path."""
    # unlike `python -m`, an installed script does not look for modules in the folder it is run from
    sys.path.insert(0, os.getcwd())
    PruningCLI()
