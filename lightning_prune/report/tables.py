"""Tables as text."""

from __future__ import annotations

import io
from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Draws a table whose last row stands apart, with rich where that is installed.

    Args:
        head: Of each column.
        rows: The last one stands apart.
        numbers: The first column of numbers, which are flush right.
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
