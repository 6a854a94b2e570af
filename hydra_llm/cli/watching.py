"""``hydra-llm nodes``: once, or again and again."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hydra_llm.cli.tables import nodes_summary, nodes_table

if TYPE_CHECKING:
    from hydra_llm.router import Router


def nodes_view(
    nodes: Sequence[Mapping[str, Any]], *, width: int = 80, ending: str = ""
) -> RenderableType:
    """The table and a line that sums it up."""
    summary = nodes_summary(nodes)
    if ending:
        summary.append(ending, style="dim")
    return Group(nodes_table(nodes, width=width), Text(), summary)


def watch(
    router: Router,
    console: Console,
    *,
    interval_seconds: float,
    as_json: bool = False,
    rounds: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """
    Show the nodes anew every ``interval_seconds``, until Ctrl-C or for some ``rounds``.

    In a terminal the table stays in its place; into a file or a pipe they follow each
    other, with ``as_json`` as one line of JSON each.
    """
    try:
        if console.is_terminal and not as_json:
            _watch_live(router, console, interval_seconds, rounds, sleep)
            return
        for number in _count(rounds):
            if number:
                sleep(interval_seconds)
                router.refresh()
            _print_once(router, console, as_json=as_json)
    except KeyboardInterrupt:
        return


def _watch_live(
    router: Router,
    console: Console,
    interval_seconds: float,
    rounds: int | None,
    sleep: Callable[[float], None],
) -> None:
    ending = f" · every {interval_seconds:g} s, Ctrl-C ends"
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for number in _count(rounds):
            if number:
                sleep(interval_seconds)
                router.refresh()
            view = nodes_view(router.get_node_resources(), width=console.width, ending=ending)
            live.update(view, refresh=True)


def _print_once(router: Router, console: Console, *, as_json: bool) -> None:
    resources = router.get_node_resources()
    if as_json:
        sys.stdout.write(json.dumps(resources, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    else:
        console.print(nodes_view(resources, width=console.width), Text())


def _count(rounds: int | None) -> range | itertools.count[int]:
    return itertools.count() if rounds is None else range(rounds)
