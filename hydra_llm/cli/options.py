"""Options that several commands have: nodes, routing words, replayed loads, JSON, debugging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hydra_llm.config import HydraSettings

ROUTING = "Routing"

Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="URL",
        help="A node, as URL or id=URL; repeat it for more. Instead of the configured ones.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="For example llama3.2:3b.")]

OneNode = Annotated[str, typer.Argument(metavar="NODE", help="A node's id, host or URL.")]

NodeId = Annotated[
    str | None,
    typer.Option(
        "--node-id",
        metavar="NODE",
        help="Pin to a node, by id, host or URL. Falls back if it cannot take it, and says so.",
        rich_help_panel=ROUTING,
    ),
]
Pin = Annotated[
    str | None,
    typer.Option(
        "--pin",
        metavar="prefer|require",
        help="How strict --node-id is.",
        rich_help_panel=ROUTING,
    ),
]
MinVram = Annotated[
    float | None,
    typer.Option(
        "--min-vram-gb",
        metavar="GB",
        help="Only nodes with this much VRAM available; if there is none, the best and a warning.",
        rich_help_panel=ROUTING,
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="prefer|require",
        help="How strict --min-vram-gb is.",
        rich_help_panel=ROUTING,
    ),
]
PreferLocal = Annotated[
    bool | None,
    typer.Option(
        "--prefer-local/--no-prefer-local",
        help="This machine first, unless it is seconds slower (the default), or not.",
        show_default=False,
        rich_help_panel=ROUTING,
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(
        "--priority",
        metavar="1-10",
        help="10 goes first when nodes are busy, 1 last; 5 by default.",
        rich_help_panel=ROUTING,
    ),
]
Session = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="KEY",
        help="Conversation: follow-ups go where the prompt cache is warm.",
        rich_help_panel=ROUTING,
    ),
]
ExcludeNodes = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude-node",
        metavar="NODE",
        help="A node not to use; repeat it for more.",
        show_default=False,
        rich_help_panel=ROUTING,
    ),
]
RequireLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--require-label",
        metavar="LABEL",
        help="Only nodes with this label; repeat it for more.",
        show_default=False,
        rich_help_panel=ROUTING,
    ),
]
PreferLabels = Annotated[
    list[str] | None,
    typer.Option(
        "--prefer-label",
        metavar="LABEL",
        help="A label that is worth some seconds; repeat it for more.",
        show_default=False,
        rich_help_panel=ROUTING,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline-s",
        metavar="SECONDS",
        help="Fail at once if no node is expected to be done in time.",
        rich_help_panel=ROUTING,
    ),
]
NumCtx = Annotated[
    int | None,
    typer.Option(
        "--num-ctx",
        min=1,
        metavar="TOKENS",
        help="Context to ask for; not named, a loaded model keeps its own.",
    ),
]

# Of a load that is replayed.
Trace = Annotated[
    str,
    typer.Option(
        "--trace",
        metavar="TRACE",
        help="poisson:rate=0.5,requests=200, a trace by name, or a CSV file.",
    ),
]
Machines = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="CLUSTER", help="demo, GPUs' sizes as 24+12+8, or a TOML file."
    ),
]
FirstSeed = Annotated[
    int, typer.Option("--first-seed", min=0, metavar="N", help="The first of the seeds.")
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        min=0.0001,
        max=1000.0,
        metavar="R",
        help="Requests in a second; a trace's time is stretched to it.",
        show_default=False,
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests",
        min=1,
        metavar="N",
        help="How many; of a trace the first ones.",
        show_default=False,
    ),
]


def routing_words(**given: Any) -> dict[str, Any]:
    """What was said on the command line; :func:`hydra_llm.words.read_words` checks it."""
    return {name: value for name, value in given.items() if value not in (None, [], ())}


def without_discovery(settings: HydraSettings) -> HydraSettings:
    """For a command that is over before a search in the background would be."""
    return settings.model_copy(update={"discovery_enabled": False})
