"""Shows findings: as a list for people, as a document for programs, as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hydra_llm.cli.doctor.checks import listed
from hydra_llm.cli.doctor.finding import Finding

MARKS = {"ok": ("✓", "green"), "warning": ("!", "bold yellow"), "problem": ("✗", "bold red")}
TITLES = {
    "settings": "Settings",
    "reachable": "Nodes",
    "version": "Versions",
    "models": "Models",
    "memory": "Memory",
    "contexts": "Contexts",
}


def exit_code(findings: Sequence[Finding], *, strict: bool) -> int:
    """2 with a problem; 1 with a warning if ``strict``; else 0."""
    levels = {finding.level for finding in findings}
    if "problem" in levels:
        return 2
    return 1 if strict and "warning" in levels else 0


def as_document(findings: Sequence[Finding], *, strict: bool) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "exit_code": exit_code(findings, strict=strict),
        **counts(findings),
        "findings": [finding.to_dict() for finding in findings],
    }


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """How many problems and warnings there are."""
    return {
        "problems": sum(1 for finding in findings if finding.level == "problem"),
        "warnings": sum(1 for finding in findings if finding.level == "warning"),
    }


def view(findings: Sequence[Finding]) -> RenderableType:
    """A list under headings, and a sentence that sums it up."""
    parts: list[RenderableType] = []
    for check, title in TITLES.items():
        about = [finding for finding in findings if finding.check == check]
        if about:
            parts += [Text(title, style="bold"), _list_of(about), Text()]
    return Group(*parts, _summary(findings))


def _list_of(findings: Sequence[Finding]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2, justify="right")
    table.add_column(ratio=1, overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.level]
        says = Text()
        if finding.nodes:
            says.append(f"{listed(finding.nodes)}: ", style="bold")
        says.append(finding.says)
        if finding.do:
            says.append(f"\n→ {finding.do}", style="cyan")
        table.add_row(Text(mark, style=style), says)
    return table


def _summary(findings: Sequence[Finding]) -> Text:
    found = counts(findings)
    if not found["problems"] and not found["warnings"]:
        return Text("✓ everything is fine", style="bold green")
    parts = []
    for what, style in (("problems", "bold red"), ("warnings", "bold yellow")):
        number = found[what]
        if number:
            parts.append((f"{number} {what if number > 1 else what[:-1]}", style))
    text = Text()
    for number, (words, style) in enumerate(parts):
        text.append(", " if number else "")
        text.append(words, style=style)
    return text
