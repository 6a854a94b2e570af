"""What can be wrong: one pure function a matter, from a look to findings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from urllib.parse import urlsplit

from hydra_llm.cli.doctor.finding import Finding, Look
from hydra_llm.config import describe_settings
from hydra_llm.types import GB, Node, NodeSnapshot

Check = Callable[[Look], Iterable[Finding]]

Version = tuple[int, ...]

SHOWS_RUNNING = (0, 1, 38)
"""``/api/ps`` exists."""
SHOWS_CAPABILITIES = (0, 6, 4)
"""``/api/show`` tells what a model can do."""
SHOWS_CONTEXT = (0, 10, 0)
"""``/api/ps`` tells a runner's context, and ``OLLAMA_NUM_PARALLEL`` is 1 by default."""
KEEPS_PROMPTS = (0, 30, 0)
"""Runners are llama-server: earlier prompts are restored, memory is judged by other rules."""
SHOWN = 6
"""Names that fit into a sentence."""


# ------------------------------------------------------------------------ settings


def settings_are_told(look: Look) -> Iterator[Finding]:
    """Where the settings come from."""
    settings = look.settings
    file = settings.config_file
    says = f"{file} is read" if file is not None else "there is no hydra.toml here"
    count = len(settings.nodes)
    says += f"; {count} node{'s' if count != 1 else ''} from {_source(settings.nodes_source)}"
    if settings.nodes_configured:
        yield Finding(level="ok", check="settings", says=says)
    else:
        yield Finding(
            level="warning",
            check="settings",
            says=f"{says}: nobody has named a node, so {settings.nodes[0].url} is taken",
            do="set HYDRA_LLM_NODES=http://rig:11434,http://gaming:11434, or write hydra.toml "
            "('hydra-llm demo' needs neither)",
        )
    changed = [
        f"{name} = {value} ({_source(source)})"
        for name, value, source in describe_settings(settings)
        if source != "default" and name != "nodes"
    ]
    if changed:
        yield Finding(level="ok", check="settings", says="; ".join(changed))


def rates_are_kept(look: Look) -> Iterator[Finding]:
    """Where what is learned of the nodes is kept."""
    if look.rates_file is None:
        return
    says = f"what is learned of the nodes is kept in {look.rates_file}"
    if not look.rates_reason:
        yield Finding(level="ok", check="settings", says=says)
        return
    yield Finding(
        level="warning",
        check="settings",
        says=f"what is learned of the nodes cannot be kept in {look.rates_file}: "
        f"{look.rates_reason}",
        do="mend that, name another folder as state_dir, or set keep_rates to false",
    )


def settings_are_safe(look: Look) -> Iterator[Finding]:
    """Settings that are allowed and hardly meant."""
    settings = look.settings
    if settings.verify is False and any(node.uses_tls for node in settings.nodes):
        yield Finding(
            level="warning",
            check="settings",
            says="verify is off: TLS certificates are not checked",
            do="set verify to the path of your CA's certificate",
        )
    silence = max(settings.first_byte_timeout, settings.stream_idle_timeout)
    if settings.lease_ttl <= silence:
        yield Finding(
            level="warning",
            check="settings",
            says=f"lease_ttl ({settings.lease_ttl:g} s) is not above the silence that is "
            f"allowed ({silence:g} s): a slow request stops counting while it still runs",
            do=f"set lease_ttl to more than {silence:g}",
        )
    for node in settings.nodes:
        if not node.local and any(_shows_its_key(*way) for way in _ways_to(node)):
            yield Finding(
                level="warning",
                check="settings",
                nodes=(node.id,),
                says="its credentials travel unencrypted over http",
                do="put TLS in front of it and use https",
            )


def _ways_to(node: Node) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The URLs that are asked for it, and what goes there."""
    yield node.url, node.headers or {}
    if node.exporter is not None:
        yield node.exporter, node.exporter_headers or {}


def _shows_its_key(url: str, headers: Mapping[str, str]) -> bool:
    return url.startswith("http:") and any(name.lower() == "authorization" for name in headers)


def _source(source: str) -> str:
    return {"argument": "the command line", "default": "the default"}.get(source, source)


# ------------------------------------------------------------------------- reachable


def nodes_answer(look: Look) -> Iterator[Finding]:
    """Who answers, and why the others do not."""
    for node in look.nodes:
        if node.health == "up":
            yield _about_an_answer(node)
            continue
        reason = node.health_reason or "it has not answered in time"
        yield Finding(
            level="problem",
            check="reachable",
            nodes=(node.id,),
            # What a probe advises is said better below, for the command line.
            says=f"{reason.partition(';')[0]}, at {node.node.url}",
            do=_remedy(node),
        )


def _about_an_answer(node: NodeSnapshot) -> Finding:
    if not node.health_reason:
        says = f"answers at {node.node.url}"
        return Finding(level="ok", check="reachable", nodes=(node.id,), says=says)
    return Finding(
        level="warning",
        check="reachable",
        nodes=(node.id,),
        says=f"answers at {node.node.url}, but {node.health_reason}: what is loaded there, and "
        "what is free, cannot be seen",
        do="a runner may hang (from 0.32.4 on, it holds /api/ps up for 20 s): "
        "'ollama stop MODEL' there, or restart it",
    )


_REMEDIES = (
    (
        ("(401)",),
        "give it credentials: http://user:password@host, or headers = "
        '{Authorization = "Bearer ..."} for the node in hydra.toml',
    ),
    (
        ("(403)",),
        "check its credentials; Ollama itself says 403 to a Host it does not know: start it "
        "with OLLAMA_HOST=0.0.0.0, or have the proxy in front pass on 'Host: localhost'",
    ),
    (("redirects",), "configure the URL it leads to, as a rule https instead of http"),
    (
        ("no ollama server", "not http"),
        "another server listens there: check scheme, port and path (Ollama's own port is 11434)",
    ),
    (("certificate",), "trust its certificate: set verify to the path of your CA's file"),
    (("tls",), "check whether it speaks https at all, and on this port"),
    (("host name",), "check the spelling, or use its IP address"),
    (("cannot be sent",), "look for odd characters in its URL and headers"),
    (
        ("answers with status",),
        "see its log ('ollama serve'); 502 to 504 come from a proxy that has lost its Ollama",
    ),
    (
        ("no answer in", "timed out", "in time"),
        "see whether it is switched on and no firewall is between; if it is just slow, raise "
        "health_check_timeout",
    ),
)


def _remedy(node: NodeSnapshot) -> str:
    reason = node.health_reason.lower() or "in time"
    for marks, remedy in _REMEDIES:
        if any(mark in reason for mark in marks):
            return remedy
    port = urlsplit(node.node.url).port
    if node.node.local:
        return f"start it: OLLAMA_HOST=127.0.0.1:{port} ollama serve"
    return (
        "see whether it is switched on and Ollama runs there; Ollama listens only to its own "
        f"machine unless it is started with OLLAMA_HOST=0.0.0.0:{port}"
    )


def nodes_are_different(look: Look) -> Iterator[Finding]:
    """Two names for one server: its memory and its slots would be counted twice."""
    for one, other in combinations(look.up, 2):
        why = _why_the_same(look, one, other)
        if why is None:
            continue
        yield Finding(
            level="problem",
            check="reachable",
            says=f"{one.id} and {other.id} are the same server: {why}",
            do=f"remove one of them; as two nodes its memory and slots count double "
            f"({one.node.url}, {other.node.url})",
        )


def _why_the_same(look: Look, one: NodeSnapshot, other: NodeSnapshot) -> str | None:
    address = look.addresses.get(one.id)
    if address is not None and address == look.addresses.get(other.id):
        return f"both lead to {address}"
    # To the microsecond: two servers do not load one model at the same instant.
    for name in one.loaded.keys() & other.loaded.keys():
        expires = one.loaded[name].expires_at
        if expires is not None and expires == other.loaded[name].expires_at:
            return f"both unload {name} at the very same instant"
    return None


# --------------------------------------------------------------------------- version


def versions_are_known(look: Look) -> Iterator[Finding]:
    """What each version can tell, and whether they are alike."""
    for node in look.up:
        yield from _about_version(node)
    old = [n.id for n in look.up if (v := version_of(n.version)) and v < KEEPS_PROMPTS]
    new = [n.id for n in look.up if (v := version_of(n.version)) and v >= KEEPS_PROMPTS]
    if old and new:
        yield Finding(
            level="warning",
            check="version",
            says=f"{listed(old)} {_run(old)} Ollama before 0.30, {listed(new)} 0.30 or later: the "
            "same seed gives other text, memory needs differ, embeddings of chat models and "
            "images for models without vision fail on the newer",
            do=f"update {listed(old)}",
        )


def _about_version(node: NodeSnapshot) -> Iterator[Finding]:
    known = version_of(node.version)
    if known is None:
        says = f"Ollama {node.version}, a build of its own" if node.version else "tells no version"
        yield Finding(level="ok", check="version", nodes=(node.id,), says=says)
        return
    lacks = ""
    if known < SHOWS_RUNNING:
        lacks = "has no /api/ps: what is loaded there, and what is free, cannot be seen"
    elif known < SHOWS_CAPABILITIES:
        lacks = "does not tell what a model can do (tools, vision), nor a loaded model's context"
    elif known < SHOWS_CONTEXT:
        lacks = "shows no context_length: whether a num_ctx restarts a model cannot be foreseen"
    if lacks:
        yield Finding(
            level="warning",
            check="version",
            nodes=(node.id,),
            says=f"Ollama {node.version} {lacks}",
            do="update it (0.30 or later also restores earlier prompts)",
        )
        return
    habit = (
        "keeps earlier prompts, so follow-ups come back cheaply"
        if known >= KEEPS_PROMPTS
        else "remembers the last prompt only; 0.30 and later restore earlier ones"
    )
    yield Finding(
        level="ok", check="version", nodes=(node.id,), says=f"Ollama {node.version} {habit}"
    )


def version_of(text: str | None) -> Version | None:
    """``0.33.0-rc2`` as ``(0, 33, 0)``; None for what is no release, like ``0.0.0``."""
    try:
        numbers = tuple(int(part) for part in (text or "").partition("-")[0].split("."))
    except ValueError:
        return None
    return numbers if any(numbers) else None


# ---------------------------------------------------------------------------- models


def models_are_there(look: Look) -> Iterator[Finding]:
    """Nodes without models, and models without a second node."""
    for node in look.up:
        if not node.installed:
            yield Finding(
                level="warning",
                check="models",
                nodes=(node.id,),
                says="no model is installed",
                do="run 'ollama pull llama3.2:3b' there",
            )
    homes = _homes(look)
    if len(look.up) < 2 or not homes:
        if homes:
            yield Finding(level="ok", check="models", says=f"installed: {listed(list(homes))}")
        return
    several = [name for name, nodes in homes.items() if len(nodes) > 1]
    if several:
        yield Finding(level="ok", check="models", says=f"on several nodes: {listed(several)}")
    single = [f"{name} ({nodes[0].id})" for name, nodes in homes.items() if len(nodes) == 1]
    if single:
        yield Finding(
            level="warning",
            check="models",
            says=f"on one node only, so nobody can take over: {listed(single)}",
            do="'ollama pull' what matters on a second node",
        )


def models_are_alike(look: Look) -> Iterator[Finding]:
    """One name for different files, and different names for one file or meaning."""
    for name, nodes in _homes(look).items():
        by_digest: dict[str, list[str]] = {}
        for node in nodes:
            by_digest.setdefault(node.installed[name].digest, []).append(node.id)
        by_digest.pop("", None)
        if len(by_digest) > 1:
            sides = " / ".join(
                f"{digest[:12]} on {listed(ids)}" for digest, ids in by_digest.items()
            )
            yield Finding(
                level="warning",
                check="models",
                says=f"{name} is not the same everywhere: {sides}",
                do=f"run 'ollama pull {name}' on all of them; answers differ until then",
            )
    yield from _confusable(look)


def _confusable(look: Look) -> Iterator[Finding]:
    homes = _homes(look)
    for one, other in combinations(sorted(homes), 2):
        here, there = homes[one], homes[other]
        if {n.id for n in here} & {n.id for n in there}:
            continue  # whoever has both tells them apart
        where = (
            f"{one} ({listed([n.id for n in here])}) and {other} ({listed([n.id for n in there])})"
        )
        digests = {n.installed[one].digest for n in here} & {
            n.installed[other].digest for n in there
        }
        if digests - {""}:
            yield Finding(
                level="warning",
                check="models",
                says=f"{where} are the same model under two names",
                do=f"run 'ollama cp {one} {other}' where {other} is missing, so that both "
                "nodes can serve it",
            )
        elif _look_alike(one, other):
            yield Finding(
                level="warning",
                check="models",
                says=f"{where} are close to each other; to the router they are two models",
                do="if one is meant, install it under one name on all of these nodes",
            )


def _look_alike(one: str, other: str) -> bool:
    """A tag left out on one node, or a letter; not another size or version of the model."""
    (base, _, tag), (other_base, _, other_tag) = one.partition(":"), other.partition(":")
    if base == other_base:
        return "latest" in (tag, other_tag)
    if tag != other_tag or _digits(base) != _digits(other_base):
        return False
    return difflib.SequenceMatcher(None, base, other_base).ratio() >= 0.85


def _digits(text: str) -> str:
    return "".join(c for c in text if c.isdigit())


def _homes(look: Look) -> dict[str, list[NodeSnapshot]]:
    """Nodes that have each model, by its name."""
    homes: dict[str, list[NodeSnapshot]] = {}
    for node in look.up:
        for name in node.installed:
            homes.setdefault(name, []).append(node)
    return dict(sorted(homes.items()))


# ---------------------------------------------------------------------------- memory


def memory_is_known(look: Look) -> Iterator[Finding]:
    """Where each node's VRAM figures come from, and how to get some."""
    unknown: dict[str, list[NodeSnapshot]] = {}
    for node in look.up:
        total, free = node.total_vram_bytes, node.free_vram_bytes
        if total == 0:
            says = "it computes on its CPU: no VRAM"
            yield Finding(level="ok", check="memory", nodes=(node.id,), says=says)
        elif free is not None:
            of = "" if total is None else f" of {total / GB:.1f}"
            says = f"{free / GB:.1f}{of} GB VRAM free, from {node.vram_source or 'its settings'}"
            yield Finding(level="ok", check="memory", nodes=(node.id,), says=says)
        else:
            unknown.setdefault(_easier_way(look, node), []).append(node)
    for easier, nodes in unknown.items():
        it_has = "it has" if len(nodes) == 1 else "they have"
        is_here = any(node.node.local for node in nodes)
        why = f" ({'; '.join(look.local_reasons)})" if is_here and look.local_reasons else ""
        yield Finding(
            level="warning",
            check="memory",
            nodes=tuple(node.id for node in nodes),
            says=f"nothing tells how much VRAM {it_has}{why}: "
            "whether a model fits cannot be foreseen",
            do=easier or _how_to_write_it_down(look, nodes),
        )


def exporters_are_read(look: Look) -> Iterator[Finding]:
    """Which nodes' exporters tell their memory, and why the others do not."""
    for node in look.up:
        if node.node.exporter is None:
            continue
        if not look.settings.vram_monitoring:
            yield Finding(
                level="warning",
                check="memory",
                nodes=(node.id,),
                says="its exporter is not read: vram_monitoring is off",
                do="set vram_monitoring to true, or leave the exporter out",
            )
            continue
        reasons = [
            reason.removeprefix("exporter: ")
            for reason in node.vram_reasons
            if reason.startswith("exporter: ")
        ]
        if reasons:
            yield Finding(
                level="warning",
                check="memory",
                nodes=(node.id,),
                says=f"its exporter at {node.node.exporter.partition('?')[0]}: "
                f"{'; '.join(reasons)}",
                do=_exporters_remedy(reasons),
            )
        else:
            yield _about_an_exporter(node)


def _about_an_exporter(node: NodeSnapshot) -> Finding:
    says = f"{(node.vram_source or 'its exporter').partition(',')[0]} answers"
    if node.observed_at is not None and node.vram_observed_at is not None:
        age = max(0.0, node.observed_at - node.vram_observed_at)
        says += f"; its figures were {'up to ' if age else ''}{age:.0f} s old"
    return Finding(level="ok", check="memory", nodes=(node.id,), says=says)


_EXPORTERS_REMEDIES = (
    (("pip install",), "pip install 'hydra-llm[gpu]' here"),
    (
        ("(401)", "(403)"),
        'give it credentials: exporter_headers = {Authorization = "Bearer ..."}, or '
        "http://user:password@host in its URL",
    ),
    (("redirects",), "configure the URL it leads to"),
    (("web page", "no exporter that is known", "status 404"), "check its port and path"),
    (("machines",), "name the exporter of the node itself, not one that gathers several"),
    (("certificate",), "trust its certificate: set verify to the path of your CA's file"),
    (
        ("no answer", "not answered"),
        "see whether it hangs; if it is just slow, raise health_check_timeout",
    ),
    (
        ("connection", "no route", "host name"),
        "see whether it runs there, listens to more than its own machine, and on this port",
    ),
    (("clock",), "have both machines set their clocks by NTP"),
)


def _exporters_remedy(reasons: Sequence[str]) -> str:
    told = "; ".join(reasons)
    for marks, remedy in _EXPORTERS_REMEDIES:
        if any(mark in told for mark in marks):
            return remedy
    return "see docs/vram.md for what each exporter tells; vram_gb stands in for what it does not"


def _easier_way(look: Look, node: NodeSnapshot) -> str:
    """What spares looking up the card's size; nothing does on another machine."""
    if not node.node.local:
        return ""
    if not look.settings.vram_monitoring:
        return "set vram_monitoring to true: it is this machine, whose GPUs could be asked"
    if not look.gpu_extra_installed:
        return (
            "for an NVIDIA card: pip install 'hydra-llm[gpu]'; for others, set vram_gb for it in "
            "hydra.toml"
        )
    return ""


def _how_to_write_it_down(look: Look, nodes: Sequence[NodeSnapshot]) -> str:
    tables = ", ".join(
        f'{{url = "{node.node.url}"{_id_of(node)}, vram_gb = 24, vram_reserved_gb = 1}}'
        for node in nodes
    )
    hidden = " (and unset HYDRA_LLM_NODES, which goes before it)"
    return (
        "write the card's size, and what other programs hold of it, into hydra.toml"
        f"{hidden if look.settings.nodes_source == 'HYDRA_LLM_NODES' else ''}: nodes = [{tables}]"
    )


def _id_of(node: NodeSnapshot) -> str:
    return "" if node.id == urlsplit(node.node.url).netloc else f', id = "{node.id}"'


# -------------------------------------------------------------------------- contexts


def contexts_agree(look: Look) -> Iterator[Finding]:
    """One model loaded with different contexts: a ``num_ctx`` restarts it on some node."""
    loaded: dict[str, dict[int, list[str]]] = {}
    for node in look.up:
        for model in node.loaded.values():
            if model.context_length is not None:
                by_context = loaded.setdefault(model.name, {})
                by_context.setdefault(model.context_length, []).append(node.id)
    for name, by_context in sorted(loaded.items()):
        if len(by_context) < 2:
            continue
        sides = ", ".join(f"{context} on {listed(ids)}" for context, ids in by_context.items())
        yield Finding(
            level="warning",
            check="contexts",
            says=f"{name} is loaded with different contexts: {sides}; long prompts are cut on "
            "one of them, and a request that names num_ctx reloads it on the other",
            do="set the same OLLAMA_CONTEXT_LENGTH on all nodes, or leave num_ctx out",
        )


def models_are_on_the_gpu(look: Look) -> Iterator[Finding]:
    """Models that lie partly in system memory, and so run several times slower."""
    for node in look.up:
        if not node.total_vram_bytes:
            continue
        for model in node.loaded.values():
            if model.size_bytes and not model.is_on_gpu:
                yield Finding(
                    level="warning",
                    check="memory",
                    nodes=(node.id,),
                    says=f"{model.name} is only {model.gpu_share:.0%} on the GPU, and slow",
                    do="use a smaller model or context there; "
                    "--min-vram-gb keeps big ones away from it",
                )


# ----------------------------------------------------------------------------- all

CHECKS: tuple[Check, ...] = (
    settings_are_told,
    rates_are_kept,
    settings_are_safe,
    nodes_answer,
    nodes_are_different,
    versions_are_known,
    models_are_there,
    models_are_alike,
    memory_is_known,
    exporters_are_read,
    models_are_on_the_gpu,
    contexts_agree,
)
"""In the order in which they are told."""


def check(look: Look, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Every finding of every check; what is the same on several nodes is said once."""
    merged: dict[tuple[str, ...], Finding] = {}
    for finding in (finding for one in checks for finding in one(look)):
        same = (finding.level, finding.check, finding.says, finding.do)
        before = merged.get(same)
        nodes = finding.nodes if before is None else before.nodes + finding.nodes
        merged[same] = replace(finding, nodes=nodes)
    return list(merged.values())


def listed(names: Sequence[str]) -> str:
    """``a, b and c``; many are cut short."""
    shown = list(names)
    if len(shown) > SHOWN:
        shown = [*shown[: SHOWN - 1], f"{len(shown) - SHOWN + 1} more"]
    if len(shown) < 2:
        return "".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _run(names: list[str]) -> str:
    return "runs" if len(names) == 1 else "run"
