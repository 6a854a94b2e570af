"""Tables for people: nodes, and decisions. Pure: plain data in, something printable out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hydra_llm.scheduling import RoutingDecision

HEALTH_STYLES = {"up": "green", "down": "red", "misconfigured": "red", "unknown": "yellow"}
ROOMY_WIDTH = 100
"""Columns from which on a model's details stand beside its name, not under it."""
NOTE_WIDTH = 26
"""Characters that the column of reasons should have, or the terms share one column."""


def plain_table(**about: Any) -> Table:
    """A table with a line under its head and nothing else."""
    return Table(
        **{
            "box": box.SIMPLE_HEAD,
            "header_style": "bold",
            "pad_edge": False,
            "padding": (0, 1, 0, 0),
            "show_edge": False,
            **about,
        }
    )


# --------------------------------------------------------------------------- nodes


def nodes_table(nodes: Sequence[Mapping[str, Any]], *, width: int = 80) -> RenderableType:
    """What ``router.get_node_resources()`` gives, a row a node."""
    table = plain_table()
    between = "  " if width >= ROOMY_WIDTH else "\n"
    table.add_column("node", overflow="fold")
    table.add_column("health", overflow="fold")
    table.add_column("VRAM free", overflow="fold")
    table.add_column("loaded models", overflow="fold", ratio=1)
    table.add_column("in flight", justify="right", min_width=2)
    for number, node in enumerate(nodes):
        if number:
            table.add_row()
        table.add_row(
            _name(node), _health(node), _vram(node), _loaded(node, between), str(node["in_flight"])
        )
    return table


def nodes_summary(nodes: Sequence[Mapping[str, Any]]) -> Text:
    """``2 of 3 nodes up, 31.5 GB VRAM free``."""
    up = [node for node in nodes if node["health"] == "up"]
    known = [node["vram_available_gb"] for node in up if node["vram_available_gb"] is not None]
    text = Text(f"{len(up)} of {len(nodes)} node{'s' if len(nodes) != 1 else ''} up")
    if known:
        text.append(f", {sum(known):.1f} GB VRAM free")
        if len(known) < len(up):
            text.append(f" ({len(up) - len(known)} unknown)")
        text.append("; █ models, ▓ others, ░ free")
    text.stylize("dim")
    return text


def in_words(seconds: float) -> str:
    """``12 ms``, ``3.4 s``."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.0995 else f"{seconds:.1f} s"


def age(seconds: float | None) -> str:
    """``now``, ``3 s ago``, ``2 min ago``."""
    if seconds is None:
        return "never"
    if seconds < 1.0:
        return "now"
    if seconds < 120.0:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:.0f} min ago"


def _name(node: Mapping[str, Any]) -> Text:
    text = Text(node["id"], style="bold")
    details = ["this machine"] if node["is_local"] else []
    details += [f"Ollama {node['version']}"] if node["version"] else []
    details += node["labels"]
    for detail in details:
        text.append(f"\n{detail}", style="dim not bold")
    return text


def _health(node: Mapping[str, Any]) -> Text:
    health = node["health"]
    text = Text(health if health != "unknown" else "not seen", style=HEALTH_STYLES[health])
    if health != "up":
        return text
    for state, is_so in (
        ("cordoned", node["cordoned"]),
        ("circuit open", node["circuit"] != "closed"),
        ("loads stuck", node["load_path_stuck"]),
    ):
        if is_so:
            text.append(f"\n{state}", style="yellow")
    return text


def _vram(node: Mapping[str, Any]) -> Text:
    if node["health"] != "up":
        return Text("–", style="dim")
    free, total = node["vram_available_gb"], node["vram_total_gb"]
    if total == 0:
        return Text("none, CPU only", style="yellow")
    if free is None:
        text = Text("unknown", style="yellow")
        # What its models were seen to hold is no more than a lower bound.
        hint = f"{total:.1f} GB or more in all" if total is not None else "set vram_gb"
        text.append(f"\n{hint}", style="dim")
        return text
    text = Text(f"{free:.1f}", style="bold")
    text.append(" GB" if total is None else f" of {total:.1f} GB", style="not bold")
    for bar in _bars(node):
        text.append("\n")
        text.append_text(bar)
    for name, gigabytes in _others(node):
        text.append(f"\n{name} {gigabytes:.1f} GB", style="yellow not bold")
    if node["vram_source"]:
        text.append(f"\n{node['vram_source']}, {age(node['vram_age_s'])}", style="dim not bold")
    return text


BAR_WIDTH = 12


def _bars(node: Mapping[str, Any]) -> list[Text]:
    """Who has the memory: a bar a GPU where they are told apart, else one for the node."""
    told = [one for one in node["devices"] if one["total_gb"] and one["used_gb"] is not None]
    if told:
        return [
            _bar(*_shares(one), label=f" {one['used_gb']:.1f}" if len(told) > 1 else "")
            for one in told
        ]
    total, free = node["vram_total_gb"], node["vram_available_gb"]
    if not total or free is None:
        return []
    models = sum(model["vram_gb"] or 0.0 for model in node["loaded_models"])
    used = max(0.0, total - free)
    return [_bar(min(1.0, models / total), max(0.0, used - models) / total)]


MOST_OTHERS = 3
WORTH_A_LINE_GB = 0.1


def _others(node: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Who else holds GPU memory, where that is told: the largest first."""
    held: dict[str, float] = {}
    for device in node["devices"]:
        for one in device["processes"] or ():
            if one["owner"] != "ollama" and one["used_gb"]:
                name = one["name"] or f"PID {one['pid']}"
                held[name] = held.get(name, 0.0) + one["used_gb"]
    largest = sorted(held.items(), key=lambda item: -item[1])[:MOST_OTHERS]
    return [(name, gigabytes) for name, gigabytes in largest if gigabytes >= WORTH_A_LINE_GB]


def _shares(device: Mapping[str, Any]) -> tuple[float, float]:
    """What Ollama has of a GPU, and what others have; all is others' where nobody tells."""
    total, used = device["total_gb"], device["used_gb"]
    held = device["processes"] or ()
    ollama = sum(one["used_gb"] or 0.0 for one in held if one["owner"] == "ollama")
    return min(1.0, ollama / total), max(0.0, used - ollama) / total


def _bar(models: float, others: float, *, label: str = "") -> Text:
    first = round(models * BAR_WIDTH)
    second = min(BAR_WIDTH - first, round(others * BAR_WIDTH))
    return Text.assemble(
        ("█" * first, "green not bold"),
        ("▓" * second, "yellow not bold"),
        ("░" * (BAR_WIDTH - first - second), "dim not bold"),
        (label, "dim not bold"),
    )


def _loaded(node: Mapping[str, Any], between: str) -> Text:
    if node["health"] != "up":
        return Text(node["health_reason"] or "no probe has come back yet", style="red")
    if not node["loaded_models"]:
        return Text("nothing loaded", style="dim")
    text = Text()
    for model in node["loaded_models"]:
        if text:
            text.append("\n")
        text.append(model["name"])
        text.append(f"{between}{_about_loaded(model)}", style="dim")
    return text


def _about_loaded(model: Mapping[str, Any]) -> str:
    size, in_vram, context = model["size_gb"], model["vram_gb"], model["context_length"]
    parts = [f"{size:.1f} GB"] if size else []
    if size and in_vram is not None and in_vram < 0.995 * size:
        parts.append(f"{in_vram / size:.0%} on GPU")
    parts.append(f"ctx {context}" if context else "ctx unknown")
    return ", ".join(parts)


# ------------------------------------------------------------------------ decisions


def decision_view(decision: RoutingDecision, *, width: int) -> RenderableType:
    """Who could take it and for how many seconds, who could not and why, and the reason."""
    parts: list[RenderableType] = []
    if decision.candidates or decision.rejections:
        parts += [decision_table(decision, width=width), Text()]
    parts.append(reason_line(decision))
    return Group(*parts)


def reason_line(decision: RoutingDecision) -> Text:
    """The one sentence, coloured by how it went."""
    if decision.selected_node is None:
        return Text.assemble(("✗ ", "bold red"), decision.reason)
    if decision.warnings:
        return Text.assemble(("! ", "bold yellow"), decision.reason)
    return Text.assemble(("→ ", "bold green"), decision.reason)


def decision_table(decision: RoutingDecision, *, width: int) -> Table:
    """
    A row a node, the chosen one first.

    Terms that cost nobody anything are left out; in a narrow terminal the others share one
    column, so that the reasons keep theirs.
    """
    rows = decision.rows()
    terms = _terms_that_matter(decision)
    names = max([4, *(len(row["node"]) for row in rows)])
    room = width - names - 4 - 10 - sum(max(len(term), 5) + 2 for term in terms)
    in_columns = room >= NOTE_WIDTH
    table = plain_table()
    table.add_column("", width=1)
    table.add_column("node", overflow="fold", min_width=min(names, 16))
    table.add_column("seconds", justify="right", no_wrap=True)
    if in_columns:
        for term in terms:
            table.add_column(term, justify="right", no_wrap=True, style="dim")
    elif terms:
        table.add_column("made up of", overflow="fold")
    table.add_column("state, or why not", overflow="fold", ratio=1)
    for row in rows:
        _add_row(table, row, terms, in_columns=in_columns)
    return table


def _terms_that_matter(decision: RoutingDecision) -> list[str]:
    seen: dict[str, float] = {}
    for candidate in decision.candidates:
        for name, seconds in candidate.costs.items():
            seen[name] = max(seconds, seen.get(name, 0.0))
    return [name for name, seconds in seen.items() if seconds >= 0.005]


def _add_row(
    table: Table, row: Mapping[str, Any], terms: Sequence[str], *, in_columns: bool
) -> None:
    if row["seconds"] is None:
        mark, style, seconds = Text("✗", style="red"), "dim", "–"
    elif row["chosen"]:
        mark, style, seconds = Text("→", style="bold green"), "bold", f"{row['seconds']:.2f}"
    else:
        mark, style, seconds = Text(" "), "", f"{row['seconds']:.2f}"
    cells = [mark, Text(row["node"]), Text(seconds)]
    if in_columns:
        cells += [Text(_term(row, name)) for name in terms]
    elif terms:
        cells.append(Text(_sum_of(row, terms), style="not bold"))
    table.add_row(*cells, Text(row["note"], style="not bold"), style=style)


def _term(row: Mapping[str, Any], name: str) -> str:
    seconds = row.get(name)
    if seconds is None:
        return ""
    return f"{seconds:.2f}" if seconds >= 0.005 else "–"


def _sum_of(row: Mapping[str, Any], terms: Sequence[str]) -> str:
    return " + ".join(f"{n} {row[n]:.2f}" for n in terms if row.get(n, 0.0) >= 0.005)


def print_decision(console: Console, decision: RoutingDecision) -> None:
    """The table and the reason, as wide as the terminal is."""
    console.print(decision_view(decision, width=console.width))
