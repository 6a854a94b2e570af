"""``hydra-llm discover``: searches, shows what it found, and writes it if it may."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from hydra_llm.cli.console import NOBODY, NotInstalledError, print_json, stderr, stdout
from hydra_llm.cli.nodesfile import NodesFile
from hydra_llm.cli.tables import plain_table
from hydra_llm.config import CONFIG_FILE, HydraSettings
from hydra_llm.discovery import (
    Announced,
    FoundNode,
    Limits,
    Progress,
    Search,
    SearchResult,
    search,
)
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.networks import read_network
from hydra_llm.probes.thread import Errands
from hydra_llm.types import GB, Node

NAMES_SHOWN = 3


def discover(
    networks: Sequence[str],
    *,
    ports: Sequence[int],
    timeout_seconds: float | None,
    rate: float,
    allow_public: bool,
    mdns: bool,
    output: Path | None,
    may_write: bool,
    as_json: bool,
) -> None:
    """
    Search, show, ask, write.

    Raises:
        ConfigurationError: there is nothing to search, it may not be searched, or the file
            cannot be added to.
        typer.Exit: nothing was found.
    """
    settings = HydraSettings()
    wanted = list(networks) or list(settings.discovery_networks)
    if not wanted and not mdns:
        raise ConfigurationError(
            "there is no network to search; name one, as hydra-llm discover 192.168.1.0/24, or "
            "set HYDRA_LLM_DISCOVERY_NETWORKS; --mdns listens for agents that announce themselves"
        )
    file = NodesFile.read(output or settings.config_file or Path(CONFIG_FILE))
    plan = Search(
        networks=[read_network(text) for text in wanted],
        ports=ports or settings.discovery_ports,
        known=_known(settings, file),
        limits=Limits(rate=rate),
        timeout_seconds=timeout_seconds or settings.discovery_timeout,
        allow_public=allow_public,
    )
    result = _search(plan, mdns=mdns)
    missing = file.missing(result.found)
    if not as_json:
        stdout().print(view(result))
        _hint_at(result)
    written = bool(missing) and _may_write(file, missing, may_write=may_write, as_json=as_json)
    if written:
        file.add(missing)
    if as_json:
        print_json({**as_document(result), "written": str(file.path) if written else None})
    elif written:
        _tell_written(file, missing, settings)
    if not result.found:
        raise typer.Exit(NOBODY)


def _known(settings: HydraSettings, file: NodesFile) -> tuple[Node, ...]:
    """What is configured. That Ollama may be on this machine is only assumed."""
    known = {node.url: node for node in settings.nodes if settings.nodes_configured}
    for node in file.nodes:
        known.setdefault(node.url, node)
    return tuple(known.values())


# -------------------------------------------------------------------------- searching


def _search(plan: Search, *, mdns: bool) -> SearchResult:
    with stderr().status("looking ...") as status:

        def show(progress: Progress) -> None:
            status.update(
                f"asked {progress.asked} of {progress.planned}, found {progress.found} ..."
            )

        async def run() -> SearchResult:
            # A resolver that hangs must not keep the process from ending.
            asyncio.get_running_loop().set_default_executor(Errands())
            announced: Sequence[Announced] = ()
            if mdns:
                status.update("listening for agents ...")
                announced = await _announced()
            return await search(plan.with_announced(announced), on_progress=show)

        return asyncio.run(run())


async def _announced() -> Sequence[Announced]:
    from hydra_llm.discovery import mdns

    try:
        return await mdns.listen()
    except mdns.MissingZeroconfError as error:
        raise NotInstalledError(str(error)) from None


# ---------------------------------------------------------------------------- showing


def view(result: SearchResult) -> RenderableType:
    """The table, and a line that sums it up."""
    summary = Text(_summary(result), style="dim")
    if not result.found:
        return summary
    table = plain_table()
    table.add_column("address", overflow="fold")
    table.add_column("Ollama", overflow="fold")
    table.add_column("models", overflow="fold", ratio=1)
    table.add_column("GPU memory", overflow="fold")
    table.add_column("known as", overflow="fold")
    for number, found in enumerate(result.found):
        if number:
            table.add_row()
        table.add_row(
            _address(found),
            Text(found.version),
            _models(found),
            _memory(found),
            Text(", ".join(node.id for node in found.known) or "–"),
        )
    return Group(table, Text(), summary)


def _address(found: FoundNode) -> Text:
    text = Text(found.url.removeprefix("http://"), style="bold")
    more = [url.removeprefix("http://") for url in found.urls[1:]]
    if more:
        others = f", {len(more) - 1} more" if len(more) > 1 else ""
        text.append(f"\nalso {more[0]}{others}", style="dim not bold")
    if found.perhaps_same_as:
        first = found.perhaps_same_as[0].removeprefix("http://")
        text.append(f"\nperhaps {first} again", style="yellow not bold")
    return text


def _models(found: FoundNode) -> Text:
    if not found.models:
        return Text("none", style="yellow")
    names = list(found.models[:NAMES_SHOWN])
    if len(found.models) > NAMES_SHOWN:
        names.append("…")
    return Text(f"{len(found.models)}: {', '.join(names)}")


def _memory(found: FoundNode) -> Text:
    exporter = found.exporter
    if exporter is None:
        text = Text("unknown", style="yellow")
        if found.locked_exporters:
            text.append("\nan exporter wants a login", style="dim not bold")
        return text
    text = Text(f"{exporter.total_bytes / GB:.1f} GB")
    if exporter.gpus > 1:
        text.append(f" on {exporter.gpus} GPUs")
    text.append(f"\n{exporter.name}", style="dim")
    return text


def _summary(result: SearchResult) -> str:
    count = len(result.found)
    what = f"{count} Ollama server{'s' if count != 1 else ''}"
    places = "address" if result.planned == 1 else "addresses"
    return f"found {what} at {result.asked} of {result.planned} {places}, {result.seconds:.1f} s"


def as_document(result: SearchResult) -> dict[str, Any]:
    """The same for programs."""
    return {
        "found": [
            {
                "url": one.url,
                "urls": list(one.urls),
                "version": one.version,
                "models": list(one.models),
                "exporter": None
                if one.exporter is None
                else {
                    "url": one.exporter.url,
                    "name": one.exporter.name,
                    "gpus": one.exporter.gpus,
                    "total_gb": one.exporter.total_bytes / GB,
                },
                "locked_exporters": list(one.locked_exporters),
                "known_as": one.known_as,
                "perhaps_same_as": list(one.perhaps_same_as),
            }
            for one in result.found
        ],
        "asked": result.asked,
        "planned": result.planned,
        "complete": result.is_complete,
        "seconds": round(result.seconds, 3),
    }


def _hint_at(result: SearchResult) -> None:
    if not result.is_complete:
        left = result.planned - result.asked
        _say(f"the time was over with {left} not asked; raise --timeout, or --rate")
    if find_spec("prometheus_client") is None and result.found:
        _say("exporters' pages cannot be read: pip install 'hydra-llm[gpu]'")
    if any(found.locked_exporters for found in result.found):
        _say("where an exporter wants a login, configure it with exporter_headers: docs/agent.md")


# ---------------------------------------------------------------------------- writing


def _may_write(
    file: NodesFile, missing: Sequence[FoundNode], *, may_write: bool, as_json: bool
) -> bool:
    if may_write:
        return True
    file.addition(missing)  # better refused before anybody is asked
    count = f"{len(missing)} node{'s' if len(missing) != 1 else ''}"
    if as_json or not _is_somebody_there():
        if not as_json:
            _say(f"nothing is written; --yes adds {count} to {file.path}")
        return False
    what = (
        f"write {file.path} with {count}?"
        if file.data is None
        else (f"add {count} at the end of {file.path}?")
    )
    return typer.confirm(what, default=False, err=True)


def _is_somebody_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _tell_written(file: NodesFile, missing: Sequence[FoundNode], settings: HydraSettings) -> None:
    doubtful = sum(bool(one.perhaps_same_as) for one in missing)
    told = f"wrote {len(missing) - doubtful} to {file.path}"
    if doubtful:
        told += f", and {doubtful} as a comment: perhaps another address of one that is there"
    _say(told)
    source = settings.nodes_source
    if source == "HYDRA_LLM_NODES":
        _say("HYDRA_LLM_NODES is set and goes before the file; unset it to have these used")
    elif not file.nodes and source != CONFIG_FILE:
        _say(f"its nodes take the place of {settings.nodes[0].url}, which was used till now")


def _say(line: str) -> None:
    stderr().print(Text(line), soft_wrap=True)
