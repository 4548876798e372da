"""Reports and command lines that take little time, for tests and for the processes that they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_prune.report import cost
from lightning_prune.report.report import Report

_CLI = TypeVar("_CLI")


def time_latency_quickly(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Time latency in three rounds."""
    set_attribute(cost, "SECONDS", 0.0)


def draw_nothing(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Write empty files in place of plots: drawing them takes a fifth of the time of a small fit."""
    set_attribute(Report, "plot", lambda report, path: Path(path).touch())


def with_one_command(cli: type[_CLI], command: str) -> type[_CLI]:
    """Return a command line without its other subcommands, whose parsers take longer than a small fit."""
    skipped = cli.subcommands()[command]  # type: ignore[attr-defined]
    return type(cli.__name__, (cli,), {"subcommands": staticmethod(lambda: {command: skipped})})
