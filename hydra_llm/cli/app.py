"""The commands: each reads its options, asks the router, and hands the rest to its module."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_llm import __version__
from hydra_llm.cli import options
from hydra_llm.cli.console import (
    NOBODY,
    make_output_safe,
    print_json,
    stderr,
    stdout,
    told_in_one_line,
)

if TYPE_CHECKING:
    from hydra_llm.router import Router

OVERVIEW = """
Routes requests over several Ollama nodes, to the one that will answer soonest.

Nodes come from --node, HYDRA_LLM_NODES, hydra.toml or OLLAMA_HOST, in this order.

\b
hydra-llm demo                   three simulated nodes, nothing to set up
hydra-llm doctor                 are my nodes and settings all right?
hydra-llm nodes --watch          what is loaded where, how much is free
hydra-llm explain llama3.2:3b    where would it go, and why?
hydra-llm fit llama3.3:70b       where can it run, with how much context?
hydra-llm chat llama3.2:3b "Why is the sky blue?"
hydra-llm litellm-config         a config.yaml of my nodes for LiteLLM
hydra-llm proxy -c config.yaml   LiteLLM's proxy, routed
hydra-llm discover NETWORK       finds nodes, and writes hydra.toml
hydra-llm cordon rig             sends nothing new to a node; drain waits too, uncordon ends it
hydra-llm simulate               what would another GPU bring? A load, replayed in virtual time
hydra-llm calibration            how far off predictions are, from a log or in the replay
hydra-llm agent                  tells others how much memory this machine's GPUs have

Every command has a --help of its own. Output is plain where it is no terminal, or NO_COLOR is set.
"""

app = typer.Typer(
    name="hydra-llm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    make_output_safe()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="hydra-llm")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"hydra-llm {__version__}\n")
        raise typer.Exit


@app.callback(help=OVERVIEW)
def overview(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    """See OVERVIEW."""


@contextmanager
def opened_router(nodes: Sequence[str] | None) -> Iterator[Router]:
    """A router over the nodes of the command line, else over the configured ones."""
    from hydra_llm import HydraSettings, Router

    settings = options.without_discovery(HydraSettings(nodes or None))
    with Router(settings=settings) as router:
        yield router


@app.command()
def nodes(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, metavar="SECONDS", help="Between two looks.")
    ] = 2.0,
    node: options.Nodes = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Show every node: health, VRAM, loaded models, requests in flight.

    Exit code: 0, whatever the nodes are like; 2 if a setting is wrong.
    """
    from hydra_llm.cli import watching

    with told_in_one_line(debug=debug), opened_router(node) as router:
        router.refresh()
        if watch:
            watching.watch(router, stdout(), interval_seconds=interval, as_json=as_json)
        elif as_json:
            print_json(router.get_node_resources())
        else:
            console = stdout()
            nodes_now = router.get_node_resources()
            console.print(watching.nodes_view(nodes_now, width=console.width))


@app.command()
def explain(
    model: options.Model,
    *,
    node_id: options.NodeId = None,
    pin: options.Pin = None,
    min_vram_gb: options.MinVram = None,
    vram: options.Vram = None,
    prefer_local: options.PreferLocal = None,
    priority: options.Priority = None,
    session: options.Session = None,
    exclude_nodes: options.ExcludeNodes = None,
    require_labels: options.RequireLabels = None,
    prefer_labels: options.PreferLabels = None,
    deadline_s: options.Deadline = None,
    num_ctx: options.NumCtx = None,
    input_tokens: Annotated[
        int, typer.Option("--input-tokens", min=0, metavar="TOKENS", help="Length of the prompt.")
    ] = 0,
    node: options.Nodes = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Say where a request for MODEL would go now, and why; nothing is sent.

    Exit code: 0 if some node can take it, 1 if none can, 2 if an option or a setting is wrong.
    """
    from hydra_llm.cli import tables

    words = options.routing_words(
        node_id=node_id,
        pin=pin,
        min_vram_gb=min_vram_gb,
        vram=vram,
        prefer_local=prefer_local,
        priority=priority,
        session=session,
        exclude_nodes=exclude_nodes,
        require_labels=require_labels,
        prefer_labels=prefer_labels,
        deadline_s=deadline_s,
    )
    with told_in_one_line(debug=debug), opened_router(node) as router:
        router.refresh()
        decision = router.explain(model, num_ctx=num_ctx, input_tokens=input_tokens, **words)
        if as_json:
            print_json(decision.to_dict())
        else:
            tables.print_decision(stdout(), decision)
        if decision.selected_node is None:
            raise typer.Exit(NOBODY)


@app.command()
def fit(
    model: options.Model,
    *,
    num_ctx: options.NumCtx = None,
    node: options.Nodes = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Say where MODEL can run, with how much context, and how fast; nothing is loaded.

    Exit code: 0 if it goes onto some node's GPUs as a whole, 1 if not, 2 if an option or a setting
    is wrong.
    """
    from hydra_llm.cli import fitting

    with told_in_one_line(debug=debug), opened_router(node) as router:
        router.refresh()
        fitting.wait_until_described(router, model)
        fits = router.fit(model, num_ctx=num_ctx)
        if as_json:
            print_json(fits)
        else:
            stdout().print(fitting.fit_view(model, fits))
        if not any(fitting.is_whole(one) for one in fits):
            raise typer.Exit(NOBODY)


@app.command()
def chat(
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to say; - reads it from stdin.")
    ],
    *,
    node_id: options.NodeId = None,
    pin: options.Pin = None,
    min_vram_gb: options.MinVram = None,
    vram: options.Vram = None,
    prefer_local: options.PreferLocal = None,
    priority: options.Priority = None,
    session: options.Session = None,
    exclude_nodes: options.ExcludeNodes = None,
    require_labels: options.RequireLabels = None,
    prefer_labels: options.PreferLabels = None,
    deadline_s: options.Deadline = None,
    num_ctx: options.NumCtx = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message.")
    ] = None,
    node: options.Nodes = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the decision on stderr as JSON.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """
    Ask MODEL one thing. The answer goes to stdout, why it came from there to stderr.

    Exit code: 0 for a whole answer; 1 if no node took or answered it; 2 if an option or a
    setting is wrong; 3 if the answer broke off, or the node refused the request.
    """
    from hydra_llm.cli import chatting

    words = options.routing_words(
        node_id=node_id,
        pin=pin,
        min_vram_gb=min_vram_gb,
        vram=vram,
        prefer_local=prefer_local,
        priority=priority,
        session=session,
        exclude_nodes=exclude_nodes,
        require_labels=require_labels,
        prefer_labels=prefer_labels,
        deadline_s=deadline_s,
    )
    with told_in_one_line(debug=debug):
        messages = chatting.messages_of(prompt, system=system)
        with opened_router(node) as router:
            chatting.chat(
                router,
                model,
                messages,
                options=None if num_ctx is None else {"num_ctx": num_ctx},
                as_json=as_json,
                words=words,
            )


@app.command()
def doctor(
    *,
    strict: Annotated[
        bool, typer.Option("--strict", help="Leave with 1 if there are warnings.")
    ] = False,
    node: options.Nodes = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Check settings and nodes: what is wrong, and what to do about it.

    Exit code: 0 if there is no problem; 1 if there are only warnings and --strict is given;
    2 if there is a problem.
    """
    from hydra_llm.cli.doctor import examine, report

    with told_in_one_line(debug=debug):
        with stderr().status("asking the nodes ..."):
            findings = examine(node)
        if as_json:
            print_json(report.as_document(findings, strict=strict))
        else:
            stdout().print(report.view(findings))
        raise typer.Exit(report.exit_code(findings, strict=strict))


@app.command()
def cordon(
    node_id: options.OneNode,
    *,
    node: options.Nodes = None,
    debug: options.Debug = False,
) -> None:
    """
    Send no new requests to NODE, from any router of yours on this machine or on the same Redis.

    What is under way there goes on. Routers look every second.

    Exit code: 0 when it is told; 2 if there is no such node, or nowhere to tell it.
    """
    from hydra_llm.cli import cordoning

    with told_in_one_line(debug=debug), opened_router(node) as router:
        cordoning.cordon(router, node_id)


@app.command()
def uncordon(
    node_id: options.OneNode,
    *,
    node: options.Nodes = None,
    debug: options.Debug = False,
) -> None:
    """
    Let requests come to NODE again.

    Exit code: 0 when it is told; 2 if there is no such node, or nowhere to tell it.
    """
    from hydra_llm.cli import cordoning

    with told_in_one_line(debug=debug), opened_router(node) as router:
        cordoning.uncordon(router, node_id)


@app.command()
def drain(
    node_id: options.OneNode,
    *,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.0,
            metavar="SECONDS",
            help="To wait at most; by default for as long as it takes.",
            show_default=False,
        ),
    ] = None,
    node: options.Nodes = None,
    debug: options.Debug = False,
) -> None:
    """
    Cordon NODE, and wait until nothing is under way there.

    Requests of other processes are counted through Redis; without it there is nothing to wait
    for, and it says so.

    Exit code: 0 when the node is idle, as far as is known; 1 when the time is over before that; 2
    if there is no such node, or nowhere to tell it.
    """
    from hydra_llm.cli import cordoning

    with told_in_one_line(debug=debug), opened_router(node) as router:
        if not cordoning.drain(router, node_id, timeout=timeout):
            raise typer.Exit(NOBODY)


@app.command()
def demo(
    *,
    speed: Annotated[
        float,
        typer.Option("--speed", min=0.1, max=20.0, help="How fast simulated nodes compute."),
    ] = 1.0,
    node: options.Nodes = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only what was proved, as JSON.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """
    Show what routing does, on three simulated nodes or, if there are any, on your own.

    With no node configured three simulated Ollama nodes are started on this machine: real
    HTTP, no GPU, nothing to download. With nodes configured only harmless things are done.

    Exit code: 0 if everything held that is claimed, else 1.
    """
    from hydra_llm.cli.demo.choosing import run_demo

    with told_in_one_line(debug=debug):
        held = run_demo(nodes=node, speed=speed, as_json=as_json)
        if not held:
            raise typer.Exit(NOBODY)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def proxy(
    context: typer.Context,
    *,
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="LiteLLM's config.yaml.")
    ],
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is anywhere.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="PORT")] = 4000,
    debug: options.Debug = False,
) -> None:
    """
    Start LiteLLM's proxy; its config may say routing_strategy: hydra.

    Any other option is LiteLLM's own, as --num_workers 4; one that is spelt like one of ours
    goes after --, as -- --debug.

    Exit code: that of LiteLLM; 1 if its proxy is not installed; 2 if the config is wrong; 130
    for Ctrl-C.
    """
    from hydra_llm.cli.proxy.running import run_proxy

    with told_in_one_line(debug=debug):
        raise typer.Exit(run_proxy(config, host=host, port=port, more=context.args))


@app.command()
def litellm_config(
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    node: options.Nodes = None,
    debug: options.Debug = False,
) -> None:
    """
    Write a config.yaml for LiteLLM: every model of every node.

    Exit code: 0 if there is something to write; 1 if no node has a model, or PyYAML is missing;
    2 if FILE exists, or a setting is wrong.
    """
    from hydra_llm.cli.litellm_config import config_text, write

    with told_in_one_line(debug=debug), opened_router(node) as router:
        write(config_text(router.refresh(), name=output), output, force=force)


@app.command()
def discover(
    network: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NETWORK]...",
            help="As 192.168.1.0/24, fd00::/120 or one address; else the configured networks.",
            show_default=False,
        ),
    ] = None,
    *,
    port: Annotated[
        list[int] | None,
        typer.Option(
            "--port",
            "-p",
            min=1,
            max=65535,
            metavar="PORT",
            help="Where Ollama may listen, 11434 by default; repeat it for more.",
            show_default=False,
        ),
    ] = None,
    mdns: Annotated[
        bool, typer.Option("--mdns", help="Listen for agents that announce themselves.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="To write to; by default the hydra.toml that is read.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "--write", "-y", help="Write without asking.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.1,
            max=3600.0,
            metavar="SECONDS",
            help="For the whole search, 60 by default.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            "--rate", min=1.0, max=1000.0, metavar="N", help="Connections begun in one second."
        ),
    ] = 50.0,
    allow_public: Annotated[
        bool,
        typer.Option("--allow-public", help="Search a network that is not private: yours alone?"),
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Search networks for Ollama servers, show them, and add them to hydra.toml.

    Only addresses of NETWORK are asked, 1,024 at most, without any login. What is found is
    shown first; a file is written only if you say yes, and what stands in it stays.

    Exit code: 0 if a server was found; 1 if none was, or zeroconf is missing; 2 if an option or
    a setting is wrong, or the file cannot be added to; 130 for Ctrl-C.
    """
    from hydra_llm.cli import discovering

    with told_in_one_line(debug=debug):
        discovering.discover(
            network or (),
            ports=port or (),
            timeout_seconds=timeout,
            rate=rate,
            allow_public=allow_public,
            mdns=mdns,
            output=output,
            may_write=yes,
            as_json=as_json,
        )


@app.command()
def simulate(
    *,
    trace: options.Trace = "poisson",
    cluster: options.Machines = "demo",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help="Who chooses; repeat it or use commas for more; all is every one.",
            show_default=False,
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="NAME=GB",
            help="Compare with one more node, as gpu24=24 or gpu24=24,bandwidth=900; repeatable.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, metavar="N", help="How many runs of each.")
    ] = 10,
    first_seed: options.FirstSeed = 0,
    rate: options.Rate = None,
    requests: options.Requests = None,
    zipf: Annotated[
        float | None,
        typer.Option(
            "--zipf",
            min=0.0,
            max=5.0,
            metavar="S",
            help="Models by Zipf's law in the cluster's order, instead of by their shares.",
            show_default=False,
        ),
    ] = None,
    shift: Annotated[
        bool, typer.Option("--shift", help="Half-way, turn the models' popularities round.")
    ] = False,
    priorities: Annotated[
        str | None,
        typer.Option(
            "--priorities",
            metavar="MIX",
            help="Draw priorities, as 10=1,5=7,2=2; all are 5 otherwise.",
            show_default=False,
        ),
    ] = None,
    by_priority: Annotated[
        bool, typer.Option("--by-priority", help="Show each priority too.")
    ] = False,
    slo: Annotated[
        float,
        typer.Option("--slo", min=0.001, metavar="SECONDS", help="To a first token in time."),
    ] = 5.0,
    sockets: Annotated[
        float | None,
        typer.Option(
            "--sockets",
            min=0.1,
            max=100.0,
            metavar="SPEED",
            help="Over real HTTP on this machine, SPEED times as fast as in life, as 10.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw it, as a .png, .svg or .pdf.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Replay a load on simulated nodes in virtual time, to see what a policy or a GPU brings.

    The real router, client and HTTP run against simulated nodes; hours pass in seconds, and
    nothing of yours is asked.

    Exit code: 0 when it is done; 1 if matplotlib is missing for --plot; 2 if an option or a file
    is wrong; 130 for Ctrl-C.
    """
    from hydra_llm.cli import simulating

    with told_in_one_line(debug=debug):
        wanted = simulating.Wanted(
            trace=trace,
            cluster=cluster,
            policies=policy or (),
            seeds=seeds,
            first_seed=first_seed,
            rate=rate,
            requests=requests,
            zipf=zipf,
            shift=shift,
            priorities=priorities,
            slo_s=slo,
            add=add or (),
            sockets=sockets,
        )
        simulating.simulate(wanted, by_priority=by_priority, plot=plot, as_json=as_json)


@app.command()
def calibration(
    *,
    log: Annotated[
        list[Path] | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="A decision log; repeat it for more. Without one, a load is replayed.",
            show_default=False,
        ),
    ] = None,
    trace: options.Trace = "poisson",
    cluster: options.Machines = "demo",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, metavar="N", help="How many runs.")
    ] = 3,
    first_seed: options.FirstSeed = 0,
    rate: options.Rate = None,
    requests: options.Requests = None,
    knowing: Annotated[
        bool, typer.Option("--knowing", help="Tell the router how long each answer will be.")
    ] = False,
    by_model: Annotated[bool, typer.Option("--by-model", help="Each model by itself.")] = False,
    by_node: Annotated[bool, typer.Option("--by-node", help="Each node by itself.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """
    Show how far off predictions are, term by term: of a decision log, or of a replayed load.

    A router writes such a log if decision_log (HYDRA_LLM_DECISION_LOG) names a file.

    Exit code: 0 when it is done; 1 if there is no answer to compare; 2 if an option or a file is
    wrong; 130 for Ctrl-C.
    """
    from hydra_llm.cli import calibrating

    with told_in_one_line(debug=debug):
        wanted = calibrating.Wanted(
            logs=log or (),
            trace=trace,
            cluster=cluster,
            seeds=seeds,
            first_seed=first_seed,
            rate=rate,
            requests=requests,
            knows_lengths=knowing,
        )
        if not calibrating.show(wanted, by_model=by_model, by_node=by_node, as_json=as_json):
            raise typer.Exit(NOBODY)


@app.command()
def agent(
    *,
    host: Annotated[
        str,
        typer.Option(
            "--host", metavar="ADDRESS", help="Where to listen; other than loopback with a token."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0 takes a free one.")
    ] = 9936,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Holds the bearer token to ask for; instead of HYDRA_LLM_AGENT_TOKEN.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate, in PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="FILE", help="Its key, if not in the same file."),
    ] = None,
    announce: Annotated[
        bool,
        typer.Option("--announce", help="Tell the network by mDNS, for hydra-llm discover --mdns."),
    ] = False,
    ollama_port: Annotated[
        int,
        typer.Option(
            "--ollama-port",
            min=1,
            max=65535,
            metavar="PORT",
            help="Where Ollama listens on this machine; --announce tells it.",
        ),
    ] = 11434,
    debug: options.Debug = False,
) -> None:
    """
    Tell how much memory this machine's GPUs have, at /metrics, to hydra-llm and Prometheus.

    Read only. It ends with Ctrl-C or SIGTERM.

    Exit code: 0 when it was stopped; 1 if zeroconf is missing for --announce; 2 if an option or
    the token is wrong, or it may not or cannot listen there.
    """
    from hydra_llm.cli.serving import serve_agent

    with told_in_one_line(debug=debug):
        serve_agent(
            host=host,
            port=port,
            token_file=token_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
            announce=announce,
            ollama_port=ollama_port,
        )
