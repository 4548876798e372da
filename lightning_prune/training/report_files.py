"""The report at the end of a fit, printed and written to files."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_prune.report.report import Report
from lightning_prune.training.lightning_packages import Trainer, rank_zero_info
from lightning_prune.training.parts import PruningParts


def report_folder(trainer: Trainer, wanted: bool | str | Path) -> Path | None:
    """Return the folder for the files of a report, or ``None`` for no files. All processes must call it.

    Args:
        trainer: The Trainer of the fit.
        wanted: A folder; or True for that of the logger or, without one, the ``default_root_dir`` that the user
            has given; or False for none.
    """
    if not isinstance(wanted, bool):
        return Path(wanted)
    own_root = Path(trainer.default_root_dir).resolve() != Path(os.getcwd()).resolve()
    if not wanted:
        return None
    if not (trainer.loggers or own_root):
        rank_zero_info("The pruning report is printed, and not written: write_report='FOLDER' says where to.")
        return None
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_report(trainer: Trainer, report: Report, parts: PruningParts, folder: Path | None) -> None:
    """Print a report and write it to files, if it is wanted, in the first process; a fast_dev_run writes none.

    Args:
        trainer: The Trainer of the fit.
        report: The report.
        parts: The arguments of the callback; its name is a part of the file names.
        folder: Where to write the files; the folder is made if it is missing. ``None`` to write none.
    """
    if not trainer.is_global_zero or not parts.write_report:
        return
    print(report.table())
    if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = "report" if parts.name is None else f"report-{parts.name}"
    (folder / f"{stem}.json").write_text(report.to_json())
    (folder / f"{stem}.html").write_text(report.to_html(), encoding="utf-8")
    try:
        report.plot(folder / f"{stem}.png")
    except ImportError:
        rank_zero_info("matplotlib is not installed, so there is no plot of the report.")
    rank_zero_info(f"Pruning report written to {folder / stem}.json and .html.")
