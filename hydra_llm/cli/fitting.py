"""``hydra-llm fit``: where a model can run, and with how much context."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from hydra_llm.cli.tables import plain_table
from hydra_llm.resources import fit_cells
from hydra_llm.scheduling.fitting import ON_GPU
from hydra_llm.types import canonical_model_name

if TYPE_CHECKING:
    from hydra_llm.router import Router

PATIENCE_SECONDS = 3.0
"""Nodes are asked about a few of their models in each round of probes."""

STYLES = {"offloads": "yellow", "unknown": "yellow", "cannot": "red"}


def is_whole(fit: Mapping[str, Any]) -> bool:
    """Whether all of the model would be on that node's GPUs."""
    return fit.get("verdict") in ON_GPU


def wait_until_described(
    router: Router, model: str, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait a moment for ``/api/show``: from the size alone the need is a rougher guess."""
    name = canonical_model_name(model)
    waited = 0.0
    while waited < PATIENCE_SECONDS:
        found = [node.installed[name] for node in router.nodes() if name in node.installed]
        if not found or any(one.shape is not None for one in found):
            return
        sleep(0.1)
        waited += 0.1


def fit_view(model: str, fits: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row a node, and what to make of it."""
    table = plain_table()
    table.add_column("node", overflow="fold")
    table.add_column("place", overflow="fold", ratio=1)
    table.add_column("needs", overflow="fold")
    table.add_column("free", justify="right")
    table.add_column("context", justify="right")
    table.add_column("longest", justify="right")
    table.add_column("tokens/s", justify="right")
    for one in fits:
        style = "green" if is_whole(one) else STYLES.get(one.get("verdict", ""), "dim")
        name, place, *figures = fit_cells(one)
        table.add_row(Text(name, style="bold"), Text(place, style=style), *figures)
    return Group(table, Text(), _summary(model, fits))


def _summary(model: str, fits: Sequence[Mapping[str, Any]]) -> Text:
    if not any("verdict" in one for one in fits):
        return Text.assemble(
            ("✗ ", "bold red"),
            f"no node that is up has {model!r}; try 'ollama pull {model}' on one",
        )
    whole = [one["node"] for one in fits if is_whole(one)]
    if whole:
        return Text.assemble(("→ ", "bold green"), f"on GPUs as a whole: {', '.join(whole)}")
    longest = [one for one in fits if one.get("largest_num_ctx")]
    if longest:
        best = max(longest, key=lambda one: int(one["largest_num_ctx"]))
        return Text.assemble(
            ("! ", "bold yellow"),
            f"on GPUs as a whole only with --num-ctx {best['largest_num_ctx']} or less, "
            f"on {best['node']}",
        )
    return Text.assemble(("! ", "bold yellow"), "on no node's GPUs as a whole")
