"""A page of tables that opens in a browser without a server or a connection: one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import compress

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --bar: #4c8bf544; --line: #8886; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }}
input {{ font: inherit; width: 100%; box-sizing: border-box; padding: .4rem .6rem; }}
input {{ position: sticky; top: .5rem; }}
section {{ overflow-x: auto; }}
table {{ border-collapse: collapse; min-width: min(100%, 48rem); font-size: 14px; }}
th, td {{ text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }}
td {{ overflow-wrap: anywhere; min-width: 5.5rem; }}
td:first-child {{ min-width: 9rem; }}
td.number {{ min-width: 0; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.share {{ background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share)); }}
svg {{ display: block; width: 100%; max-width: 48rem; height: 11rem; }}
.curve {{ display: inline-block; margin-right: 2rem; }}
.curve::before {{ content: ""; display: inline-block; width: 1rem; border-top: 3px solid var(--colour); }}
.curve::before {{ margin-right: .5rem; vertical-align: middle; }}
</style>
</head>
<body>
<h1>{title}</h1>
<input type="search" placeholder="Search names, reasons, events" aria-label="Search">
{sections}
<script>
const input = document.querySelector("input");
input.addEventListener("input", () => {{
  const wanted = input.value.toLowerCase();
  for (const section of document.querySelectorAll("section")) {{
    const rows = [...section.querySelectorAll("tbody tr, li")];
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    section.hidden = rows.length > 0 && rows.every((row) => row.hidden);
  }}
}});
</script>
</body>
</html>
"""
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c")
_WIDTH, _HEIGHT, _MARGIN = 720, 200, 4  # of a chart, in units of its own; a browser stretches it


@dataclass(frozen=True)
class Share:
    """A cell that shows a share in [0, 1] as a number of percent and as a bar."""

    value: float


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading with lines of text, a chart and a table. One with none of them is left out.

    Args:
        title: The heading.
        lines: Lines of text.
        curves: Name to points (x, y) of each curve of the chart; x are optimizer steps, and each
            curve has a vertical scale of its own.
        head: Titles of the columns.
        rows: Cells by row: text, numbers, shares, or ``None`` for what is not known. A column in which nothing
            is known is left out.
    """

    title: str
    lines: Sequence[str] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str | float | Share | None]] = ()

    def html(self) -> str:
        """Return the section as HTML."""
        parts = [f"<h2>{escape(self.title)}</h2>"]
        if self.lines:
            parts += ["<ul>", *(f"<li>{escape(line)}</li>" for line in self.lines), "</ul>"]
        if self.curves:
            parts.append(_chart(self.curves))
        if self.rows:
            columns = list(zip(*self.rows, strict=True))
            known = [any(cell is not None for cell in column) for column in columns]
            head = map(_heading, compress(self.head, known), compress(columns, known))
            rows = (f"<tr>{''.join(map(_cell, compress(row, known)))}</tr>" for row in self.rows)
            parts += [f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>", *rows, "</tbody></table>"]
        return "\n".join(("<section>", *parts, "</section>"))


def page(title: str, sections: Sequence[Section]) -> str:
    """Return an HTML page without references to other files. A field at its top searches all rows and lines.

    Args:
        title: The title of the page.
        sections: Its parts, in order.
    """
    shown = (part.html() for part in sections if part.lines or part.curves or part.rows)
    return _PAGE.format(title=escape(title), sections="\n".join(shown))


def _heading(name: str, column: Sequence[str | float | Share | None]) -> str:
    """Return the heading of a column, on the side where its cells are."""
    side = "" if any(isinstance(cell, str) for cell in column) else ' class="number"'
    return f"<th{side}>{escape(name)}</th>"


def _cell(value: str | float | Share | None) -> str:
    if isinstance(value, Share):
        return f'<td class="number share" style="--share: {value.value:.2%}">{value.value:.2%}</td>'
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return f'<td class="number">{text}</td>'


def _chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return curves over one horizontal axis as SVG, with the least and the largest value of each."""
    points = [point for curve in curves.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    labels, lines = [], []
    for place, (name, curve) in enumerate(curves.items()):
        low, high = min(y for _, y in curve), max(y for _, y in curve)
        drawn = " ".join(
            f"{_scaled(x, left, right) * (_WIDTH - 2 * _MARGIN) + _MARGIN:.1f},"
            f"{_HEIGHT - _MARGIN - _scaled(y, low, high) * (_HEIGHT - 2 * _MARGIN):.1f}"
            for x, y in (curve[0], *curve)  # a point alone is drawn, too
        )
        colour = _COLOURS[place % len(_COLOURS)]
        label = escape(f"{name}: {low:.4g} to {high:.4g}")
        labels.append(f'<span class="curve" style="--colour: {colour}">{label}</span>')
        lines.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"'
            ' stroke-linecap="round" vector-effect="non-scaling-stroke"/>'
        )
    shape = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true"'
    svg = f"<svg {shape}>{''.join(lines)}</svg>"
    return f"<p>{' '.join(labels)}</p>{svg}<p>step {left:,} to {right:,}</p>"


def _scaled(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
