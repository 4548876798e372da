"""Formatting of text tables, with or without rich."""

from __future__ import annotations

import io
from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Return a table as text, drawn by rich if that is installed.

    Args:
        head: Titles of the columns.
        rows: Cells by row; rich draws a line above the last row.
        numbers: Index of the first column that is aligned to the right, as are all columns after it.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)) for row in (head, *rows)]
        return "\n".join(lines) + "\n"
    table = Table(*head)
    for column in table.columns[numbers:]:
        column.justify = "right"
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    text = io.StringIO()
    width = max(len(row[0]) for row in rows) + 15 * len(head)
    Console(file=text, width=max(80, width)).print(table)
    return text.getvalue()
