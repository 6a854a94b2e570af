"""
The tables of faults in docs/reliability.md, written anew from the rows that the tests assert.

::

    python -m tests.faults.table
"""

from itertools import groupby
from pathlib import Path

from tests.faults.rows import BROKEN, PARTS, Ending, Row
from tests.helpers import between_marks

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
START = "<!-- faults: written by `python -m tests.faults.table` -->\n"
END = "<!-- end of faults -->\n"
HEAD = (
    "| What fails | To blame | You see, with another node | You see, with one node | How long |\n"
    "|---|---|---|---|---|"
)


def table() -> str:
    parts = []
    for title, rows in PARTS.items():
        lines = "\n".join(line(row) for row in rows)
        parts.append(f"### {title}\n\n{HEAD}\n{lines}\n")
    return "\n".join(parts)


def line(row: Row) -> str:
    cells = (f"**{row.name}**: {row.happens}", blame(row), with_another(row), alone(row), time(row))
    assert not any("|" in cell for cell in cells)
    return f"| {' | '.join(cells)} |"


def blame(row: Row) -> str:
    told = row.blame.told
    if row.blame_alone is not None:
        told += f"; alone, {row.blame_alone.told}"
    if row.blame_in_one_piece is not None:
        told += f"; in one piece, {row.blame_in_one_piece.told}"
    return told


def with_another(row: Row) -> str:
    if row.is_mid_stream:
        return f"of a stream, {BROKEN.told}; else the answer, from another node"
    if row.cause is None:
        return f"the answer; {row.claim}"
    return "the answer, from another node"


def alone(row: Row) -> str:
    if row.is_mid_stream:
        return f"of a stream, the same; else {row.alone[0].told}"
    endings: list[Ending] = [ending for ending, _ in groupby(row.alone)]
    told = [ending.told for ending in endings[:2]]
    if len(endings) > 2:
        return f"{told[0]} or {told[1]}, in turns"
    return ", then ".join(told)


def time(row: Row) -> str:
    one = f"`{row.limit}`" if row.limit else "at once"
    if row.cause is None or row.asks == 1:
        return one
    return f"{one}; {row.failing} of {row.asks} requests"


def with_table(page: str) -> str:
    return between_marks(page, START, END, table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
