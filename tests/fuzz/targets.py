"""One function for each thing that is read from a node or from another router.

Each makes something absurd of a seed, has the real code read it, and asserts what always holds:
nothing is raised but the typed errors, what comes out is plain data of the right types, and a
request can still be scheduled over it, with the honest node beside it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import h11
import httpx

from hydra_llm.cluster import Cluster, Lease, RatesFile
from hydra_llm.cluster.exchange import Exchange, Seen
from hydra_llm.cluster.rates import rates_in
from hydra_llm.cluster.rates_file import LEAST, MOST
from hydra_llm.discovery.answers import MOST_MODELS, NAME_LENGTH, Place, ask_loaded, ask_server
from hydra_llm.discovery.calling import Caller, Reply, _exchange
from hydra_llm.discovery.mdns import MOST_ADDRESSES, SERVICE, understood
from hydra_llm.dispatch import Dispatch
from hydra_llm.exceptions import NodeError, StreamBrokenError
from hydra_llm.ollama import answers
from hydra_llm.ollama.answers import AnswerReader, error_text
from hydra_llm.ollama.calls import Framing
from hydra_llm.ollama.errors import error_of_answer
from hydra_llm.probes.exporters import read_page
from hydra_llm.probes.node import NodeProbe
from hydra_llm.probes.shown import ShowCache
from hydra_llm.replies import whole_answer
from hydra_llm.scheduling import Choice
from hydra_llm.types import InferenceRequest, Node, Observation, Usage
from tests.cluster.ledgers import Clock, ledger, node, seen
from tests.fuzz.spoiling import (
    pages,
    recorded,
    recorded_streams,
    spoilt_bytes,
    spoilt_json,
)
from tests.helpers import LLAMA

SECRET = "the-prompt-itself"
"""Stands in seeds where a prompt or an answer would; it may turn up in no message."""


def is_plain(value: object) -> bool:
    """Whether there is no number in a record that one could not reckon with."""
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int):
        return abs(value) < 1 << 128
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, str | bytes):
        return True
    if isinstance(value, Mapping):
        return all(is_plain(one) for one in value.values())
    if isinstance(value, tuple | list | frozenset | set):
        return all(is_plain(one) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return all(is_plain(getattr(value, one.name)) for one in fields(value))
    return False


def is_usage(usage: Usage | None) -> bool:
    if usage is None:
        return True
    figures = [getattr(usage, one.name) for one in fields(usage)]
    return all(
        one is None or (isinstance(one, int | float) and math.isfinite(one) and one >= 0)
        for one in figures
    )


# ------------------------------------------------------------------------- answers


def stream(random: Random) -> None:
    """A streamed answer, cut anywhere, means the same and takes a bounded room."""
    is_sse, body = random.choice(recorded_streams())
    body = spoilt_bytes(random, body)
    framing = random.choice((Framing.SSE if is_sse else Framing.NDJSON, *Framing))
    cuts = sorted(random.randint(0, len(body)) for _ in range(random.randint(0, 12)))
    edges = [0, *cuts, len(body)]
    largest = max(stop - start for start, stop in pairwise(edges))
    whole, cut = AnswerReader(framing), AnswerReader(framing)
    limits = {"MAX_LINE_BYTES": (2000, 1 << 23), "MOST_BETWEEN_BYTES": (100, 1 << 20)}
    with ExitStack() as stack:
        for name, sizes in limits.items():
            stack.enter_context(patch.object(answers, name, random.choice(sizes)))
        whole.feed(body)
        for start, stop in pairwise(edges):
            cut.feed(body[start:stop])
            assert len(cut.rest) <= answers.MAX_LINE_BYTES + largest
        whole.end()
        cut.end()

    def facts(reader: AnswerReader) -> tuple[Any, ...]:
        return (
            *(reader.parts, reader.is_complete, reader.error, reader.usage),
            *(reader.is_too_long, reader.is_no_json),
        )

    assert facts(cut) == facts(whole)
    assert is_usage(whole.usage)
    assert whole.error is None or isinstance(whole.error, str)


class _Held:
    """As much of a :class:`Dispatch` as an answer in one piece has to do with."""

    def __init__(self) -> None:
        self.node = Node("http://127.0.0.1:1", id="a")
        self.call = SimpleNamespace(model=LLAMA)
        self.usage: Usage | None = None

    def complete(self, usage: Usage | None) -> None:
        self.usage = usage

    def incomplete(self, parts: int) -> StreamBrokenError:
        return StreamBrokenError("cut", parts=parts, node_id="a", node_url="")


def whole(random: Random) -> None:
    """An answer in one piece is one, or the node's error; its text is in no message."""
    seed = {**random.choice(recorded("nonstream", "embed", "v1-")), "hint": SECRET}
    data = spoilt_json(random, seed)
    held = _Held()
    try:
        response = whole_answer(cast(Dispatch, held), httpx.Response(200), data)
    except NodeError as error:
        assert SECRET not in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(response.extensions["hydra_document"], dict)
        assert is_usage(held.usage)


def error(random: Random) -> None:
    """An error's text becomes a typed error that repeats none of it."""
    seed = random.choice(recorded("err-", "unknown", "sigkill")) or {}
    data = spoilt_json(random, {"error": SECRET, **seed} if random.random() < 0.5 else seed)
    text = error_text(data)
    assert text is None or isinstance(text, str)
    status = random.choice((-1, 100, 101, 204, 301, 400, 401, 403, 404, 408, 429, 500, 503, 999))
    retry = random.choice(("", "nan", "inf", "-1", "1e999", "9" * 5000, "5", "\ud800", "٣"))
    found = error_of_answer(_Held().node, LLAMA, status, text, {"retry-after": retry})
    if found is not None:
        assert isinstance(found, NodeError)
        assert SECRET not in str(found)
        after = getattr(found, "retry_after_seconds", None)
        assert after is None or 0 <= after < 86_400


# --------------------------------------------------------------------------- probes


def _probed(bodies: Mapping[str, bytes]) -> list[Observation]:
    """What a probe makes of a node that answers with these bodies, and of what it learns after."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=bodies[request.url.path])

    async def look() -> list[Observation]:
        probe = NodeProbe(
            node("a"),
            httpx.MockTransport(answer),
            shown=ShowCache(),
            timeout_seconds=20.0,
            clock=lambda: 0.0,
            wall_clock=lambda: 1.8e9,
        )
        found = [await probe.probe()]
        for _ in range(3):
            if not await probe.learn():
                break
            if (more := probe.with_what_was_learned()) is not None:
                found.append(more)
        found.append(await probe.probe())
        return found

    return asyncio.run(look())


def api(random: Random) -> None:
    """A node's own catalogue: whatever it says, routing goes on."""
    tags = random.choice(recorded("tags"))
    names = [model["name"] for model in tags["models"]]
    bodies = {
        "/api/tags": tags,
        "/api/version": random.choice(recorded("-version")),
        "/api/ps": random.choice(recorded("ps-")),
        "/api/show": random.choice(recorded("show-rand")),
    }
    spoilt = random.sample(sorted(bodies), random.randint(1, 4))
    sent = {
        path: spoilt_json(random, body, times=6) if path in spoilt else json.dumps(body).encode()
        for path, body in bodies.items()
    }
    observations = _probed(sent)
    for one in observations:
        assert one.health in ("up", "misconfigured")
        assert is_plain((one.version, one.loaded, one.health_reason))
        for model in (one.installed or {}).values():
            assert 0 <= model.size_bytes <= 1 << 60
            assert (model.name + model.digest).isprintable()
    _schedules(observations, random.choice((LLAMA, *names)))


def page(random: Random) -> None:
    """A metrics exporter's page."""
    text = spoilt_bytes(random, random.choice(pages()), times=12).decode(errors="replace")
    reading = read_page(text)
    assert is_plain((reading.devices, reading.host, reading.reasons))
    for device in reading.devices:
        assert (device.key + device.name + device.vendor).isprintable()
    _schedules([replace(seen("a"), devices=reading.devices, host=reading.host)], LLAMA)


def _schedules(observations: Sequence[Observation], model: str) -> None:
    """A request for the model can be placed, at a price that is a number, and without the node."""
    honest = seen("honest", models=(model, LLAMA))
    cluster = ledger(honest, nodes=[node("a"), node("honest")], clock=Clock())
    for one in observations:
        cluster.observe(one)
    for wanted in (model, LLAMA):
        _place(cluster, InferenceRequest(model=wanted, input_tokens=500))
    _place(cluster, InferenceRequest(model=LLAMA, exclude_nodes=frozenset({"a"})), wins="honest")


def _place(cluster: Cluster, request: InferenceRequest, wins: str | None = None) -> None:
    held = cluster.acquire(request)
    assert isinstance(held, Lease)
    choice = held.placement.choice
    assert isinstance(choice, Choice)
    for candidate in choice.candidates():
        assert not math.isnan(candidate.total_seconds)
        assert all(not math.isnan(cost) for cost in candidate.costs.values())
    chosen = next(one for one in choice.candidates() if one.node_id == held.node_id)
    assert math.isfinite(chosen.total_seconds)
    assert wins in (None, held.node_id)
    cluster.succeeded(held, Usage(output_tokens=20, decode_seconds=1.0, total_seconds=1.0))


# ------------------------------------------------------------------- other routers

_LEASE = {
    "model": LLAMA,
    "expected_seconds": 3.5,
    "priority": 5,
    "load_seconds": 2.0,
    "reserved_bytes": 4_000_000_000,
    "cpu_share": 0.25,
    "evicts": ["qwen3:8b"],
    "loading": True,
    "options": {"num_ctx": 4096, "use_mmap": True},
}


def message(random: Random) -> None:
    """What another router, or another program, has put into Redis."""
    exchange = Exchange("me", [node("a"), node("honest")], lease_seconds=15.0)
    exchange.message([], [], {}, 0.0)
    name = random.choice((b"you:1", b"\xff\xfe", b""))
    leases = [name, random.randint(-(10**6), 10**6), spoilt_json(random, _LEASE)]
    wishes = [random.randint(0, 10**6), spoilt_json(random, {LLAMA: [5, 3000]})]
    found = exchange.seen([b"ok", b"7", [], [leases, []], wishes], now=100.0)
    assert isinstance(found, Seen)
    assert found.leases is not None
    for running in found.leases["a"].values():
        assert is_plain(running)
        assert running.reserved_bytes >= 0
    cluster = ledger(seen("a"), seen("honest"))
    cluster.see_others(found.leases, found.wishes)
    rate = spoilt_bytes(random, b"-4.3 17", times=1)
    digest = seen("a").installed[LLAMA].digest  # type: ignore[index]  # it has some
    kind = random.choice(("decode", "slots", "prefill", "load"))
    names = [f"{kind} {digest} {LLAMA}".encode(), rate, b"load_bandwidth - -", rate]
    cluster.adopt(rates_in([names, []], ["a", "honest"]))
    _place(cluster, InferenceRequest(model=LLAMA, input_tokens=500, exclude_nodes=_HONEST))
    _place(cluster, InferenceRequest(model=LLAMA, input_tokens=500))


_HONEST = frozenset({"honest"})

_RATES = {
    "hydra_llm_rates": 1,
    "nodes": {
        "http://a:11434": {
            "": {"at": 90, "load_bandwidth": [1.6e9, 5], "bandwidth": [9e11, 7]},
            f"digest of {LLAMA}": {
                "at": 90,
                **{
                    "decode": [0.0125, 40],
                    "prefill": [0.0004, 40],
                    "slots": [4, 1],
                    "need": [1, 1],
                },
            },
        }
    },
}


def rates(random: Random) -> None:
    """The file of learned rates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rates.json"
        path.write_bytes(spoilt_json(random, _RATES, times=6))
        found = RatesFile(path).read(100.0)
    kept: dict[str, Any] = {}
    for (url, digest), entry in found.items():
        for rate in entry.rates.values():
            assert LEAST <= rate.value <= MOST
            assert rate.samples >= 1
        if url == "http://a:11434":
            kept[digest] = entry.rates
    cluster = ledger(seen("a"), seen("honest"))
    cluster.recall("a", kept)
    _place(cluster, InferenceRequest(model=LLAMA, input_tokens=500, exclude_nodes=_HONEST))


# ------------------------------------------------------------------------ discovery


class _Told(Caller):
    """Answers by itself."""

    def __init__(self, bodies: Mapping[str, bytes]) -> None:
        super().__init__()
        self._bodies = bodies

    async def get(self, address: Any, port: int, path: str, *, most_bytes: int) -> Reply:
        return Reply(200, self._bodies[path])


def discovered(random: Random) -> None:
    """What an address answers that a search has come by."""
    bodies = {
        "/api/version": spoilt_json(random, {"version": "0.32.15"}),
        "/api/tags": spoilt_json(random, random.choice(recorded("tags")), times=6),
        "/api/ps": spoilt_json(random, random.choice(recorded("ps-"))),
    }
    caller, place = _Told(bodies), Place(ipaddress.ip_address("127.0.0.1"), 11434)
    server = asyncio.run(ask_server(caller, place))
    told = asyncio.run(ask_loaded(caller, place))
    lines = [] if server is None else [server.version, *(t for m in server.models for t in m)]
    lines += [text for one in told or () for text in one]
    assert all(len(line) <= NAME_LENGTH and line.isprintable() for line in lines)
    assert server is None or len(server.models) <= MOST_MODELS


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
REPLIES = (
    HEAD + b'Content-Length: 20\r\n\r\n{"version":"0.32.1"}',
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nTrailer: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + HEAD + b"Content-Length: 0\r\n\r\n",
    HEAD + b"\r\nuntil it closes",
)


REMOTE_FAULTS: tuple[type[Exception], ...] = (h11.RemoteProtocolError, OSError)
"""What :meth:`Caller.get` makes a :class:`NoAnswerError` of."""


class _Nowhere:
    """What is said to it is lost."""

    def write(self, data: bytes) -> None:
        assert data

    async def drain(self) -> None:
        return


def http(random: Random) -> None:
    """HTTP itself, as a search reads it."""
    data = spoilt_bytes(random, random.choice(REPLIES))

    async def ask() -> Reply:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await _exchange(reader, cast(Any, _Nowhere()), "127.0.0.1:1", "/", 10_000)

    try:
        reply = asyncio.run(asyncio.wait_for(ask(), 20))
    except REMOTE_FAULTS:
        return
    assert isinstance(reply.status, int)
    assert len(reply.body) <= 10_000


def announcement(random: Random) -> None:
    """A packet of mDNS and what an announcement says; zeroconf reads it first."""
    from zeroconf import DNSIncoming  # type: ignore[attr-defined]  # not in its __all__
    from zeroconf.asyncio import AsyncServiceInfo

    text = spoilt_bytes(random, b"\x0collama=11434"[1:])
    info = AsyncServiceInfo(
        SERVICE,
        f"rig-1.{SERVICE}",
        port=random.choice((0, 9936, 65535)),
        addresses=[random.choice((b"\x7f\x00\x00\x01", b"\xfe\x80" + bytes(14), bytes(16)))],
        properties=bytes([len(text) & 255]) + text,
    )
    found = understood(info)
    if found is not None:
        assert 0 < found.port < 65536
        assert found.name.isprintable()
        assert 0 < len(found.addresses) <= MOST_ADDRESSES
    DNSIncoming(spoilt_bytes(random, bytes(12) + b"\x0a_hydra-llm\x04_tcp\x05local\x00", times=9))


TARGETS: dict[str, Callable[[Random], None]] = {
    "stream": stream,
    "whole": whole,
    "error": error,
    "api": api,
    "page": page,
    "message": message,
    "rates": rates,
    "discovered": discovered,
    "http": http,
    "announcement": announcement,
}
