"""The command line ``lightning-prune``: LightningCLI with a PruningCallback and with further subcommands."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import nn

import lightning_prune
from lightning_prune.callbacks.oneshot import oneshot
from lightning_prune.callbacks.pruning import PruningCallback, pruning_callbacks
from lightning_prune.channels.compaction.shrink import compact
from lightning_prune.core.configurations import config_in, with_readable_configs
from lightning_prune.core.files import read_file
from lightning_prune.core.mistyped import with_nearest_names
from lightning_prune.core.probes import own_example
from lightning_prune.criteria.weights import Magnitude
from lightning_prune.export.compacted import callback_state_in, load_compact, masks_in, plans_in, state_keys_in
from lightning_prune.export.onnx import export_onnx
from lightning_prune.export.packed import save_packed
from lightning_prune.report.cost import dense_bytes
from lightning_prune.report.latency import measure_latency
from lightning_prune.report.sensitivity import RATIOS, sensitivity
from lightning_prune.training.lightning_packages import (
    PACKAGES,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    Trainer,
    classes,
    package_of,
)
from lightning_prune.training.sandbox import forward_probe
from lightning_prune.training.trainer_data import first_batch
from lightning_prune.training.trainer_queries import monitored_metric

if TYPE_CHECKING:  # the classes that those below are mixed into
    _Trainer = Trainer
    _CLI = LightningCLI
else:
    _Trainer = _CLI = object


class PruningCommands(_Trainer):
    """What a Trainer gets to plan, report and export pruning, to measure sensitivity, and to prune at once.

    Each method accepts the configuration file of a fit, and so has its arguments even if it does not use them.
    """

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print what a fit would prune, and what it would keep and why, without training.

        Args:
            model: The module that would be pruned.
            datamodule: Provides a batch if one is needed and the module has no example_input_array.
            ckpt_path: A checkpoint to take the weights from.
            weights_only: Not used: only tensors and plain values are read from a checkpoint.
        """
        if ckpt_path is not None:
            load_compact(read_file(ckpt_path, "ckpt_path"), model)
        for callback in pruning_callbacks(self):
            print(callback.plan(model, self._example(model, datamodule, callback.needs_example)).table())

    def report(
        self,
        model: LightningModule,
        ckpt_path: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print the pruning report of a checkpoint.

        Args:
            model: A module of the class that was trained.
            ckpt_path: A checkpoint of a fit with a PruningCallback.
            datamodule: Not used.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint has no pruning state, or does not fit the model.
        """
        checkpoint = read_file(ckpt_path, "ckpt_path")
        load_compact(checkpoint, model)
        for callback in pruning_callbacks(self):
            state = callback_state_in(checkpoint, callback.state_key)
            if state is None:
                there = ", ".join(state_keys_in(checkpoint))
                others = f" It holds {there}: --pruning.name is the name in brackets." if there else ""
                raise ValueError(f"ckpt_path={ckpt_path!r} holds no state of {callback.state_key}.{others}")
            print(callback.report_of(model, state, own_example(model)).table())

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        path: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Export the masked or compacted model of a checkpoint to an ONNX file or a packed file.

        Args:
            model: A module of the class that was trained.
            ckpt_path: The checkpoint.
            path: The file to write. If its name ends in .onnx, it is an ONNX file, checked on the module's
                example_input_array or, without one, on a batch of data; with --pruning.compact true, a masked
                model is compacted first. Otherwise it is a packed file, which load_packed reads: one of
                safetensors if its name ends in .safetensors.
            datamodule: Provides a batch if the module has no example_input_array.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint does not fit the model, there is no example input for an ONNX file, or
                no masks for a packed file.
            CompactionError: If outputs of the compacted model differ.
        """
        checkpoint = read_file(ckpt_path, "ckpt_path")
        load_compact(checkpoint, model)
        if Path(path).suffix.lower() == ".onnx":
            example = self._example(model, datamodule)
            # a fit compacts the model at its end, after the checkpoints that it saves itself
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
        """Prune each layer alone, without retraining, and print the validation metric by removed share.

        Criterion and structure are those of the fit, except that Magnitude replaces a criterion that needs
        training steps.

        Args:
            model: A module of the class that was trained.
            datamodule: Provides the validation data.
            ckpt_path: A checkpoint to take the weights from; by default the module is evaluated as created.
            metric: Name of the metric that validation logs; by default the metric that a callback monitors.
            ratios: Shares of each layer's units to remove.
            path: Path of the files to write, without suffix: .json and, if matplotlib is installed, .png.
            weights_only: Not used.

        Raises:
            ValueError: If validation does not log the metric, or the checkpoint does not fit the model.
        """
        if ckpt_path is not None:
            load_compact(read_file(ckpt_path, "ckpt_path"), model)
        if self.progress_bar_callback is not None:
            self.progress_bar_callback.disable()  # sensitivity() shows one bar for the whole sweep
        wanted = metric or monitored_metric(self) or ""

        def evaluate(network: nn.Module) -> float:
            results = self.validate(model, datamodule, verbose=False)  # one dict per dataloader
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
                example=self._example(model, datamodule, pruning.structure.needs_example),
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

    def oneshot(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        batches: int | None = None,
        path: str = "oneshot.ckpt",
        weights_only: bool | None = None,
    ) -> None:
        """Prune a trained network to the target without training, reconstruct it, and save it.

        Args:
            model: A module of the class that was trained.
            datamodule: Provides training batches and validation data.
            ckpt_path: A checkpoint to take the weights from; by default those that the module is made with.
            batches: How many training batches are used; by default as many as pruning.reconstruct says, or 8.
            path: The checkpoint to write.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint does not fit the model, or the arguments of --pruning do not.
        """
        found = oneshot(self, model, datamodule, ckpt_path, batches=batches, path=path)
        print(found.report.table())
        for name, value in found.pruned.items():
            print(f"{name}: dense {found.dense[name]:.4g}, pruned {value:.4g}")
        if found.renewed:
            print("The statistics of batch norms were taken anew.")
        print(f"{path}: written")

    def latency(
        self,
        model: LightningModule,
        out: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        batch: int = 1,
        weights_only: bool | None = None,
    ) -> None:
        """Measure the times of the network's layers by width on this device, and write them to a file.

        It is what --pruning.selector.table takes, on any machine, with Global and budget latency. Structure and
        device are those of the fit.

        Args:
            model: A module of the class that will be trained.
            out: The JSON file to write.
            datamodule: Provides a batch if the module has no example_input_array.
            ckpt_path: A checkpoint to take the weights from, which do not matter as a rule.
            batch: The batch size to measure.
            weights_only: Not used.

        Raises:
            ValueError: If the checkpoint does not fit the model, or the model does not run on such a batch.
        """
        if ckpt_path is not None:
            load_compact(read_file(ckpt_path, "ckpt_path"), model)
        for pruning in pruning_callbacks(self):
            example = self._example(model, datamodule)
            table = measure_latency(model.to(self.strategy.root_device), example, pruning.structure, batch)
            path = (
                Path(out) if pruning.name is None else Path(out).with_stem(f"{Path(out).stem}-{pruning.name}")
            )
            table.save(path)
            print(f"{path}: {table!r}, {1000 * table.dense:.4g} ms; {table.noise or 'written'}")

    def _example(
        self, model: LightningModule, datamodule: LightningDataModule | None, needed: bool = True
    ) -> Any:
        """Return the module's ``example_input_array`` or, if it has none but needs one, a probe of a batch."""
        if model.example_input_array is not None or not needed:
            return own_example(model)
        return forward_probe(self, model, first_batch(self, model, datamodule))


def _suggesting(
    error: Callable[..., NoReturn], parsers: list[LightningArgumentParser], message: str, *more: Any
) -> NoReturn:
    """End the command with a message and, where a class or an argument is mistyped, the nearest names."""
    arguments = {name.removeprefix("--") for parser in parsers for name in parser._option_string_actions}
    error(with_nearest_names(message, lightning_prune.__all__, arguments), *more)


class PruningArguments(_CLI):
    """What a LightningCLI gets to have a PruningCallback, configured under ``--pruning``.

    Its subcommands are those of LightningCLI, and ``plan``, ``report``, ``export``, ``sensitivity``,
    ``oneshot`` and ``latency``.
    """

    pruning_trainer: type[Trainer]  # that is used unless another is given

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", self.pruning_trainer)
        self._parsers: list[LightningArgumentParser] = []  # of the command and of its subcommands
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that names the nearest classes or arguments where one is mistyped."""
        parser = super().init_parser(**kwargs)
        self._parsers.append(parser)
        parser.error = partial(_suggesting, parser.error, self._parsers)  # type: ignore[method-assign]
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of PruningCallback as ``--pruning``."""
        parser.add_lightning_class_args(PruningCallback, "pruning")

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the arguments that LightningCLI sets itself for each subcommand, by subcommand."""
        ours = {"model", "datamodule"}
        theirs: dict[str, set[str]] = super().subcommands()
        names = ("plan", "report", "export", "sensitivity", "oneshot", "latency")
        return theirs | dict.fromkeys(names, ours)


class PruningTrainer(PruningCommands, Trainer):
    """A Trainer that can also plan, report and export pruning, measure sensitivity and time, prune at once."""


class PruningCLI(PruningArguments, LightningCLI):
    """A LightningCLI whose Trainer has a PruningCallback, configured under ``--pruning``.

    Its subcommands are those of LightningCLI, and ``plan``, ``report``, ``export``, ``sensitivity``,
    ``oneshot`` and ``latency``. Modules are those of ``lightning.pytorch``, if that is installed: see
    :func:`cli_of`.
    """

    pruning_trainer = PruningTrainer


def cli_of(package: str) -> type[LightningCLI]:
    """Return the PruningCLI for modules of a package: ``"lightning.pytorch"`` or ``"pytorch_lightning"``."""
    place = PACKAGES.index(package)
    if place == 0:
        return PruningCLI

    def mixed(ours: type, module: str, name: str) -> type:
        return type(ours.__name__, (ours, classes(module, name)[place]), {})

    found: Any = mixed(PruningArguments, "cli", "LightningCLI")
    found.pruning_trainer = mixed(PruningCommands, "trainer", "Trainer")
    return cast(type[LightningCLI], found)


def main() -> None:
    """Run the ``lightning-prune`` command, for any LightningModule and data module given by class path.

    Subcommands that do not train read the configuration that another LightningCLI has written, too.
    """
    # unlike `python -m`, an installed script does not have the working directory on the import path
    sys.path.insert(0, os.getcwd())
    cli = cli_of(_package_of_model(sys.argv[1:]))
    commands = {
        name: signature(each).parameters for name, each in vars(PruningCommands).items() if callable(each)
    }
    sys.argv[1:] = with_readable_configs(sys.argv[1:], commands, signature(Trainer).parameters)
    cli()


def _package_of_model(arguments: Sequence[str]) -> str:
    """Return the package of the LightningModule that arguments or configuration files name, or the first."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "--model.class_path")
    parser.add_argument("--config", "-c", action="append", default=[])
    given, _ = parser.parse_known_args(arguments)
    for path in (given.model, *map(_model_in, given.config)):
        try:
            found = locate(path) if isinstance(path, str) else None
        except ErrorDuringImport:  # the command will tell
            continue
        if isinstance(found, type) and (package := package_of(found)):
            return package
    return PACKAGES[0]


def _model_in(path: str) -> Any:
    """Return the class path of the model in a configuration file, for all commands or for one."""
    content = config_in(path)
    sections = [content, *content.values()] if isinstance(content, dict) else []
    model = next((each["model"] for each in sections if isinstance(each, dict) and "model" in each), None)
    return model.get("class_path") if isinstance(model, dict) else model
