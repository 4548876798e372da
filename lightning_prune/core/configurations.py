"""Configuration files that another LightningCLI has written: what of them is read here."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_CALLBACK = "PruningCallback"
_OPTIMIZERS = ("optimizer", "lr_scheduler")
_NO_CLASS = (
    "the configuration holds arguments of the model and no class that can be imported, as a LightningCLI for"
    " one class, or for those of its script, writes it: name it, as in --model mine.Net."
)
_SECTIONS = ("seed_everything", "trainer", "pruning", "data", *_OPTIMIZERS)


def with_readable_configs(
    arguments: Sequence[str], commands: Mapping[str, Collection[str]], trainer_arguments: Collection[str]
) -> list[str]:
    """Return arguments with what is read here in place of each configuration file of another LightningCLI.

    What is left aside is printed.

    Args:
        arguments: The arguments of a command line. Those of other subcommands are returned as they are.
        commands: Name of each subcommand to the names of its own arguments.
        trainer_arguments: Names of the arguments of the Trainer.

    Raises:
        ValueError: If the class of the model is not known.
    """
    if not arguments or arguments[0] not in commands:
        return [*arguments]
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--config", "-c", action="append", default=[])
    given, others = parser.parse_known_args(arguments[1:])
    classes = {name: found[-1] for name in ("model", "data") if (found := getattr(given, name))}
    configs = []
    for path in given.config:
        content = config_in(path)
        if not isinstance(content, dict):  # the command will tell
            configs.append(path)
            continue
        sections = (*_SECTIONS, *commands[arguments[0]])
        config, aside = adapt(content, classes, sections, trainer_arguments)
        if aside:
            print(f"{path}: {arguments[0]} does not use {', '.join(aside)}.")
        configs.append(path if config == content else yaml.safe_dump(config))
    named = {"config": configs} | {name: [path] for name, path in classes.items()}
    return [
        arguments[0],
        *(each for name, values in named.items() for value in values for each in (f"--{name}", value)),
        *others,
    ]


def config_in(path: str) -> Any:
    """Return what a configuration file holds; ``None`` if it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):  # the command will tell
        return None


class Adapted(NamedTuple):
    """A configuration that is read here.

    Attributes:
        config: The configuration.
        left_aside: Names of the entries that it lacks, with dots.
    """

    config: dict[str, Any]
    left_aside: list[str]


def adapt(
    config: Mapping[str, Any],
    classes: Mapping[str, str],
    sections: Collection[str],
    trainer_arguments: Collection[str],
) -> Adapted:
    """Return the part of the configuration of another LightningCLI that is read here.

    A CLI for one class of modules writes the arguments alone, and one whose script holds the class writes
    ``__main__``: then the class is taken from ``classes``. A PruningCallback among the Trainer's callbacks
    becomes the section ``pruning``. Sections for arguments of that CLI alone are left aside.

    Args:
        config: The configuration; it is not changed.
        classes: For ``"model"`` and ``"data"`` the class path that the command line gives, if it gives one.
        sections: Names of the sections that are read here.
        trainer_arguments: Names of the arguments of the Trainer.

    Raises:
        ValueError: If the class of the model is not known.

    >>> adapt({"model": {"width": 8}, "own": 1}, {"model": "mine.Net"}, ["model"], [])
    Adapted(config={'model': {'class_path': 'mine.Net', 'init_args': {'width': 8}}}, left_aside=['own'])
    """
    found = {name: value for name, value in config.items() if name in sections}
    aside = [name for name in config if name not in sections]
    for name in _OPTIMIZERS:
        if name in found and found[name] is not None and not _class_path(found[name]):
            del found[name]
            aside.append(name)
    for name in ("model", "data"):
        if isinstance(found.get(name), Mapping):
            section = _with_class(found.pop(name), classes.get(name))
            if section is not None:
                found[name] = section
            elif name == "model":
                raise ValueError(_NO_CLASS)
            else:
                aside.append(f"{name} (its class is not in the file: name it, as in --{name} mine.Data)")
    if isinstance(found.get("trainer"), Mapping):
        aside += [f"trainer.{name}" for name in found["trainer"] if name not in trainer_arguments]
        trainer = {name: value for name, value in found["trainer"].items() if name in trainer_arguments}
        found["trainer"] = trainer
        if "pruning" not in found:
            found |= _pruning_out_of_(trainer)
    return Adapted(found, aside)


def _pruning_out_of_(trainer: dict[str, Any]) -> dict[str, Any]:
    """Take the first PruningCallback out of a Trainer's callbacks, and return its section; none without one."""
    given = trainer.get("callbacks") or []
    callbacks = [given] if isinstance(given, Mapping) else given
    ours = next((each for each in callbacks if _is_ours(each)), None)
    if ours is None:
        return {}
    trainer["callbacks"] = [each for each in callbacks if each is not ours]
    return {"pruning": ours.get("init_args") or {}}


def _with_class(section: Mapping[str, Any], given: str | None) -> dict[str, Any] | None:
    """Return a section with a class path; ``None`` if none is known."""
    path = _class_path(section)
    if path is not None and not path.startswith("__main__."):
        return dict(section)
    arguments = section.get("init_args") or {} if path else dict(section)
    return None if given is None else {"class_path": given, "init_args": arguments}


def _class_path(section: Any) -> str | None:
    found = section.get("class_path") if isinstance(section, Mapping) else None
    return found if isinstance(found, str) else None


def _is_ours(callback: Any) -> bool:
    package, _, name = (_class_path(callback) or "").rpartition(".")
    return name == _CALLBACK and package.partition(".")[0] in ("", "lightning_prune")
