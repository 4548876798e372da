"""The command line: LightningCLI with PruningCallback under ``--pruning``; reports and files of the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from lightning_prune.callbacks.pruning import PruningCallback, pruning_callbacks
from lightning_prune.channels.compaction import compact
from lightning_prune.core.files import read_file
from lightning_prune.criteria import Magnitude
from lightning_prune.export.compacted import callback_state_in, load_compact, masks_in, plans_in, state_keys_in
from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.packed import save_packed
from lightning_prune.report.cost import dense_bytes
from lightning_prune.report.sensitivity import RATIOS, sensitivity
from lightning_prune.training.sandbox import forward_probe
from lightning_prune.training.trainer_queries import first_batch, monitored_metric


class PruningTrainer(Trainer):
    """A Trainer that can also look ahead, and back.

    Each method takes what a saved configuration of a fit holds.
    """

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Prints what a fit would prune, what stays and why, without training.

        Args:
            model: What would be pruned.
            datamodule: Where a batch is needed, of a module without an example_input_array.
            ckpt_path: A checkpoint to start from.
            weights_only: Not used: nothing but tensors and plain values is read.
        """
        if ckpt_path is not None:
            load_compact(read_file(ckpt_path, "ckpt_path"), model)
        for callback in pruning_callbacks(self):
            print(callback.plan(model, self._example_if(callback.needs_example, model, datamodule)).table())

    def report(
        self,
        model: LightningModule,
        ckpt_path: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Prints the report of a checkpoint.

        Args:
            model: Of the class that was trained.
            ckpt_path: A checkpoint of a fit with a PruningCallback.
            datamodule: Not used.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint has no pruning state, or does not belong to the model.
        """
        checkpoint = read_file(ckpt_path, "ckpt_path")
        load_compact(checkpoint, model)
        for callback in pruning_callbacks(self):
            state = callback_state_in(checkpoint, callback.state_key)
            if state is None:
                raise ValueError(f"ckpt_path={ckpt_path!r} holds no state of {callback.state_key}.")
            print(callback.report_of(model, state, model.example_input_array).table())

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        path: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes the network of a checkpoint, masked or compacted, to a file of its own.

        Args:
            model: Of the class that was trained.
            ckpt_path: A checkpoint.
            path: The file to write: an ONNX file if its name ends in .onnx, tried on the module's
                example_input_array or, without one, on a batch of data; with compact, a masked network is
                compacted for it. Otherwise a packed file, which load_packed reads.
            datamodule: Where a batch is needed.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint does not belong to the model, or there is nothing to try or to pack.
            CompactionError: If outputs of the compacted network differ.
        """
        checkpoint = read_file(ckpt_path, "ckpt_path")
        load_compact(checkpoint, model)
        if Path(path).suffix.lower() == ".onnx":
            example = self._example(model, datamodule)
            # checkpoints that the fit itself saved are older than its end, when it compacts
            if any(callback.compact for callback in pruning_callbacks(self)) and not plans_in(checkpoint):
                model = compact(model, masks_in(checkpoint), example)
            kind, size = "ONNX", export_onnx(model, path, example)
        else:
            if not state_keys_in(checkpoint):
                raise ValueError(f"ckpt_path={ckpt_path!r} holds no masks: there is nothing to pack.")
            kind = "packed"
            size = save_packed(model, masks_in(checkpoint), path, plans=plans_in(checkpoint))
        print(f"{path}: {kind}, {size:,} bytes; parameters and buffers of the network: {dense_bytes(model):,}")

    def sensitivity(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        ratios: Sequence[float] = RATIOS,
        path: str = "sensitivity",
        weights_only: bool | None = None,
    ) -> None:
        """Prunes each layer alone, without retraining, and prints the metric that validation gives.

        Criterion and structure are those of the fit, but Magnitude for a criterion that needs training steps.

        Args:
            model: Of the class that was trained.
            datamodule: With a validation set.
            ckpt_path: A checkpoint to look at; the model as it is made by default.
            metric: As validation logs it; the monitored one by default.
            ratios: Shares of each layer's units.
            path: Files to write, without their endings: .json and, where matplotlib is installed, .png.
            weights_only: Not used.

        Raises:
            ValueError: If validation does not log the metric, or the checkpoint does not belong to the model.
        """
        if ckpt_path is not None:
            load_compact(read_file(ckpt_path, "ckpt_path"), model)
        if self.progress_bar_callback is not None:
            self.progress_bar_callback.disable()  # one bar, for all of it
        wanted = metric or monitored_metric(self) or ""

        def evaluate(network: nn.Module) -> float:
            results = self.validate(model, datamodule, verbose=False)  # one mapping a loader
            logged = {name: value for result in results for name, value in result.items()}
            if wanted not in logged:
                raise ValueError(
                    f"metric={wanted!r} must be one that validation logs: {', '.join(logged) or 'none'}. Give"
                    " it as --metric, unless a checkpoint callback of the configuration monitors it."
                )
            return float(logged[wanted])

        for pruning in pruning_callbacks(self):
            found = sensitivity(
                model,
                evaluate,
                ratios=ratios,
                criterion=Magnitude() if pruning.criterion.needs else pruning.criterion,
                structure=pruning.structure,
                example=self._example_if(pruning.structure.needs_example, model, datamodule),
                metric=wanted,
            )
            if self.is_global_zero:
                print(found.table())
                stem = path if pruning.name is None else f"{path}-{pruning.name}"
                Path(f"{stem}.json").write_text(found.to_json())
                try:
                    found.plot(f"{stem}.png")
                except ImportError as error:
                    print(f"No plot: {error}")

    def _example_if(self, needed: bool, model: LightningModule, datamodule: LightningDataModule | None) -> Any:
        return self._example(model, datamodule) if needed else model.example_input_array

    def _example(self, model: LightningModule, datamodule: LightningDataModule | None) -> Any:
        if model.example_input_array is not None:
            return model.example_input_array
        return forward_probe(self, model, first_batch(self, model, datamodule))


class PruningCLI(LightningCLI):
    """LightningCLI whose Trainer has a PruningCallback, configured under ``--pruning``.

    Its subcommands are LightningCLI's, ``plan``, ``report``, ``export`` and ``sensitivity``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", PruningTrainer)
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--pruning``."""
        parser.add_lightning_class_args(PruningCallback, "pruning")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's, ``plan``, ``report``, ``export`` and ``sensitivity``."""
        ours = {"model", "datamodule"}
        return LightningCLI.subcommands() | dict.fromkeys(("plan", "report", "export", "sensitivity"), ours)


def main() -> None:
    """Entry point of ``lightning-prune``: any LightningModule and data module, by class path."""
    # unlike `python -m`, an installed script does not look for modules in the folder it is run from
    sys.path.insert(0, os.getcwd())
    PruningCLI()
