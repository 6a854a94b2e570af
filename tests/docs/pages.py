"""The pages people read, and what is fenced in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DECISION = ROOT / "docs" / "how-a-decision-is-made.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

FENCED = re.compile(
    r"(?:^<!-- (?P<mark>[a-z-]+)(?:: (?P<says>[^>]*?))? -->\n+)?^```(?P<language>\w+)\n"
    r"(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """
    One fenced block.

    A comment just before it may mark it: ``no-test: why`` leaves it out, ``prints`` means that it
    is what the Python block before it prints.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str
    says: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    """All blocks of a page, or those in some languages."""
    text = text_of(page)
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("text")) + 1,
            language=found["language"],
            text=found["text"],
            mark=found["mark"] or "",
            says=found["says"] or "",
        )
        for found in FENCED.finditer(text)
        if not languages or found["language"] in languages
    ]


def section(page: Path, title: str) -> str:
    """What stands under one heading, headings below it included."""
    found = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)",
        text_of(page),
        re.DOTALL | re.MULTILINE,
    )
    assert found is not None, f"{page.name} has no heading {title!r}"
    return found[2]


def table(text: str) -> list[list[str]]:
    """The cells of all table rows, without heads and rules."""
    rows: list[list[str]] = []
    for before, line in zip(["", *text.splitlines()], text.splitlines(), strict=False):
        if line.startswith("|") and before.startswith("|") and not line.startswith("|--"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows
