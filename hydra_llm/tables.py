"""What people look at: rows as text for a terminal, as tables and bars for a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

__all__ = ["html_table", "printable", "stacked_bars", "text_table"]

Row = Sequence[str]


def text_table(head: Row, rows: Sequence[Row]) -> str:
    """Columns two spaces apart, as wide as their widest cell."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def html_table(head: Row, rows: Sequence[Row], *, bold: int | None = None) -> str:
    """
    A table with everything in it escaped.

    Args:
        head: the columns' names.
        rows: as many cells each; a line break in a cell is one in the table.
        bold: the number of a row that should stand out.
    """
    lines = [f"<tr>{''.join(f'<th>{_escaped(cell)}</th>' for cell in head)}</tr>"]
    for number, row in enumerate(rows):
        # Notebooks align to the right, which suits numbers only.
        style = "text-align:left" + (";font-weight:bold" if number == bold else "")
        cells = "".join(f'<td style="{style}">{_escaped(cell)}</td>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


# Told apart also by who sees few colours (Okabe and Ito's palette).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
_REST = "#dddddd"
_LABEL, _BAR, _LINE = 150, 380, 24


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, unit: str, rest: str | None = None
) -> str:
    """
    A picture: a bar a row, a segment a part, as SVG.

    Args:
        rows: what each bar stands for, and its parts by name; parts of no size are left out.
        unit: of the sizes.
        rest: the name of a part that should look like room left.
    """
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0)
    if longest <= 0.0:
        return ""
    named = [name for name in dict.fromkeys(n for _, parts in rows for n in parts) if name != rest]
    # By place among all names, so that a part has one colour in several pictures.
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(named)}
    shown = {name for _, parts in rows for name, size in parts.items() if size > 0.0}
    drawn: list[str] = []
    for number, (label, parts) in enumerate(rows):
        top, left = number * _LINE, float(_LABEL)
        drawn.append(_text(0, top + 15, label))
        for name, size in parts.items():
            width = _BAR * size / longest
            if width > 0.0:
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top + 3}" width="{width:.1f}" height="16" '
                    f'fill="{colours.get(name, _REST)}"><title>{_escaped(name)}: {size:.2f} {unit}'
                    "</title></rect>"
                )
            left += width
        total = sum(parts.values())
        drawn.append(_text(left + 6, top + 15, f"{total:.{1 if total >= 1 else 2}f} {unit}"))
    legend = "".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="color:'
        f'{colours.get(name, _REST)}">&#9632;</span> {_escaped(name)}</span>'
        for name in (*named, rest)
        if name in shown
    )
    area = f'width="{_LABEL + _BAR + 80}" height="{len(rows) * _LINE}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {area} role="img">{"".join(drawn)}</svg>'
    return f"<div>{svg}<br><small>{legend}</small></div>"


def _text(x: float, y: float, text: str) -> str:
    # Notebooks may be dark: the text takes the page's colour.
    style = 'font-size="12" fill="currentColor"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def printable(text: str) -> str:
    """Without what a terminal would obey: nodes say what becomes names and reasons."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
