"""One node, asked over a transport without sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timezone
from types import FunctionType
from typing import Any

import httpx
import pytest

from hydra_llm.probes import shown as shown_module
from hydra_llm.probes.api import MAX_BODY_BYTES
from hydra_llm.probes.local import LocalMemory
from hydra_llm.probes.memory import GPU_OVERHEAD_BYTES
from hydra_llm.probes.node import NodeProbe
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.probes.shown import SHOW_RETRY_SECONDS, ShowCache
from hydra_llm.types import GB, HostMemory, Node, Observation

TAGS = {"models": [{"name": "llama3", "size": 4 * GB, "digest": "d1"}]}
PS = {"models": [{"name": "llama3", "size": 5 * GB, "size_vram": 5 * GB, "context_length": 4096}]}
SHOW = {
    "modelfile": "# Modelfile\nFROM /usr/share/ollama/.ollama/models/blobs/sha256-5ee4\n",
    "capabilities": ["completion", "tools"],
    "model_info": {
        "general.architecture": "x",
        "x.block_count": 2,
        "x.context_length": 8192,
        "x.embedding_length": 64,
        "x.attention.head_count": 4,
    },
}

SOON = 0.3

STRANGE = "/api/tags is something that no Ollama server sends"

Answer = httpx.Response | Exception | Any


class Wire(httpx.AsyncBaseTransport):
    """Answers by path: a response, JSON, an exception to raise, or a function of the request."""

    def __init__(self, **answers: Answer) -> None:
        self.answers: dict[str, Answer] = {
            "version": {"version": "0.32.15"},
            "tags": TAGS,
            "ps": PS,
            "show": SHOW,
            **answers,
        }
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers[request.url.path.rpartition("/")[2]]
        if isinstance(answer, FunctionType):
            answer = await answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    def asked(self, path: str) -> list[httpx.Request]:
        return [request for request in self.requests if request.url.path.endswith(path)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def silence(request: httpx.Request) -> None:
    await asyncio.Event().wait()


def probe_of(
    wire: Wire,
    node: Node | None = None,
    *,
    shown: ShowCache | None = None,
    clock: Callable[[], float] | None = None,
    **about: Any,
) -> NodeProbe:
    return NodeProbe(
        Node("http://rig:11434", id="rig") if node is None else node,
        wire,
        shown=ShowCache() if shown is None else shown,
        clock=Clock() if clock is None else clock,
        # Only what waits for silence is in a hurry: the machine may be busy.
        **{"timeout_seconds": SOON if silence in wire.answers.values() else 30.0, **about},
    )


async def look(node: Node | None = None, **answers: Answer) -> Observation:
    return await probe_of(Wire(**answers), node).probe()


def verdict(seen: Observation) -> tuple[str, str]:
    return seen.health, seen.health_reason


async def test_a_healthy_node_is_up_with_all_it_says() -> None:
    seen = await look(Node("http://rig:11434", id="rig", vram_gb=24))

    assert verdict(seen) == ("up", "")
    assert (seen.node_id, seen.observed_at, seen.version) == ("rig", 100.0, "0.32.15")
    assert list(seen.installed or ()) == list(seen.loaded or ()) == ["llama3:latest"]
    assert seen.free_vram_bytes == 19 * GB - GPU_OVERHEAD_BYTES
    assert (seen.vram_source, seen.vram_observed_at) == ("config - /api/ps", 100.0)
    assert (seen.devices, seen.host) == (None, None)


async def test_what_is_seen_is_as_old_as_the_beginning_of_the_round() -> None:
    clock = Clock()

    async def later(request: httpx.Request) -> httpx.Response:
        clock.now += 1.0
        return httpx.Response(200, json=PS)

    seen = await probe_of(Wire(ps=later), clock=clock).probe()

    assert (seen.observed_at, clock.now) == (100.0, 101.0)


async def test_the_remark_on_memory_stays_when_models_are_unloaded() -> None:
    wire = Wire()
    probe = probe_of(wire)
    await probe.probe()
    wire.answers["ps"] = {"models": []}

    seen = await probe.probe()

    assert (seen.total_vram_bytes, seen.free_vram_bytes) == (None, None)
    assert seen.vram_source == "/api/ps: at least 5.5 GB"


# ---------------------------------------------------------------- parts that fail


@pytest.mark.parametrize("answer", [httpx.Response(404), silence, httpx.ReadError("x"), [], 3])
async def test_a_node_without_a_version_is_up(answer: Answer) -> None:
    seen = await look(version=answer)

    assert (seen.health, seen.version) == ("up", None)


async def test_a_hung_runner_that_blocks_ps_leaves_the_node_up() -> None:
    seen = await look(ps=silence)

    assert verdict(seen) == ("up", "/api/ps gave no answer in 0.3 s")
    assert seen.loaded is None
    assert seen.installed


async def test_while_ps_is_silent_what_it_last_said_counts_with_its_age() -> None:
    clock, wire = Clock(), Wire()
    node = Node("http://rig:11434", id="rig", vram_gb=24)
    probe = probe_of(wire, node, clock=clock, timeout_seconds=SOON)
    before = await probe.probe()
    wire.answers["ps"], clock.now = silence, 200.0

    seen = await probe.probe()

    assert seen.free_vram_bytes == before.free_vram_bytes
    assert (seen.observed_at, seen.vram_observed_at) == (200.0, 100.0)


async def test_what_was_loaded_before_a_node_went_down_is_not_counted_after_it() -> None:
    wire = Wire()
    node = Node("http://rig:11434", id="rig", vram_gb=24)
    probe = probe_of(wire, node, timeout_seconds=SOON)
    await probe.probe()
    wire.answers["tags"] = httpx.ConnectError("x")
    await probe.probe()
    wire.answers.update(tags=TAGS, ps=silence)

    assert (await probe.probe()).free_vram_bytes is None


# --------------------------------------------------------------------- the verdict


def caused_by(error: BaseException) -> Exception:
    """As httpx raises it: with the system's error somewhere below."""
    outer, middle = httpx.ConnectError("All connection attempts failed"), OSError("no luck")
    middle.__cause__ = error
    outer.__context__ = middle
    return outer


CERTIFICATE = ssl.SSLCertVerificationError("x")
CERTIFICATE.verify_message = "self-signed certificate"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (caused_by(ConnectionRefusedError(errno.ECONNREFUSED, "x")), "connection refused"),
        (caused_by(OSError(errno.EHOSTUNREACH, "x")), "no route to host"),
        (caused_by(socket.gaierror(-2, "x")), "its host name is unknown"),
        (caused_by(CERTIFICATE), "its TLS certificate is not accepted: self-signed certificate"),
        (caused_by(ssl.SSLError(1, "x")), "the TLS handshake failed"),
        (httpx.ConnectError("x"), "no connection"),
        (httpx.ReadError("x"), "the connection broke"),
        (httpx.ConnectTimeout("x"), "/api/tags gave no answer in 30 s"),
        (httpx.RemoteProtocolError("Server disconnected without ..."), "the connection broke"),
        (RuntimeError("x"), "it could not be asked (RuntimeError)"),
    ],
)
async def test_a_node_that_cannot_be_reached_is_down(error: Exception, reason: str) -> None:
    assert verdict(await look(tags=error)) == ("down", reason)


async def test_a_silent_node_is_down_after_the_timeout() -> None:
    seen = await look(tags=silence, version=silence, ps=silence)

    assert verdict(seen) == ("down", "/api/tags gave no answer in 0.3 s")


async def test_one_silence_of_a_node_that_was_up_is_forgiven_and_a_second_is_not() -> None:
    wire, clock = Wire(), Clock()
    probe = probe_of(wire, clock=clock, timeout_seconds=SOON)
    first = await probe.probe()
    said = dict(wire.answers)
    wire.answers.update(tags=silence, version=silence, ps=silence)
    clock.now += 5.0

    once = await probe.probe()
    twice = await probe.probe()
    wire.answers.update(said)
    again = await probe.probe()
    wire.answers.update(tags=silence)

    assert verdict(once) == ("up", "/api/tags gave no answer in 0.3 s")
    # What is shown is as old as it is.
    assert (once.observed_at, once.loaded) == (first.observed_at, None)
    assert verdict(twice) == ("down", "/api/tags gave no answer in 0.3 s")
    assert verdict(again) == ("up", "")
    assert verdict(await probe.probe())[0] == "up"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
async def test_a_node_that_says_later_or_fails_is_down(status: int) -> None:
    seen = await look(tags=httpx.Response(status, text="<html>"))

    assert verdict(seen) == ("down", f"/api/tags answers with status {status}")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (httpx.Response(401), "refuses access (401); check Node(headers=...)"),
        (httpx.Response(403), "refuses access (403); check Node(headers=...)"),
        (httpx.Response(307), "redirects (307); configure the URL it leads to"),
        (httpx.Response(404), "/api/tags answers with status 404: no Ollama server"),
        (httpx.Response(204), "/api/tags answers with status 204: no Ollama server"),
        (httpx.Response(200, html=" <p>"), "/api/tags is a web page that no Ollama server sends"),
        (httpx.Response(200), STRANGE),
        (httpx.Response(200, text="{"), STRANGE),
        (httpx.Response(200, json=[]), STRANGE),
        (httpx.Response(200, text="[" * 100_000), STRANGE),
        (httpx.Response(200, content=b"\xff"), STRANGE),
        (httpx.RemoteProtocolError("illegal status line"), "what it sends is not HTTP"),
        (httpx.LocalProtocolError("b'sesame'"), "its configured URL or headers cannot be sent"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_is_no_ollama_server_or_wants_other_credentials_is_misconfigured(
    answer: Answer, reason: str
) -> None:
    assert verdict(await look(tags=answer)) == ("misconfigured", reason)


async def test_a_redirect_is_not_followed() -> None:
    wire = Wire(tags=httpx.Response(302, headers={"Location": "http://elsewhere/api/tags"}))

    await probe_of(wire).probe()

    assert {request.url.host for request in wire.requests} == {"rig"}


async def test_a_body_beyond_the_limit_is_not_read_to_its_end() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield bytes(1 << 20)

    seen = await probe_of(
        Wire(tags=httpx.Response(200, content=endless())), timeout_seconds=10.0
    ).probe()

    assert verdict(seen) == ("misconfigured", "/api/tags is larger than 16 MiB: no Ollama server")
    assert sent == MAX_BODY_BYTES + (1 << 20)


async def test_a_body_that_trickles_in_does_not_outlast_the_timeout() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    wire = Wire(tags=httpx.Response(200, content=trickle()))
    seen = await probe_of(wire, timeout_seconds=SOON).probe()

    assert seen.health == "down"


async def test_when_the_tags_fail_nothing_waits_for_the_rest() -> None:
    probe = probe_of(
        Wire(tags=httpx.Response(401), ps=silence, version=silence), timeout_seconds=60.0
    )

    seen = await asyncio.wait_for(probe.probe(), 5.0)

    assert seen.health == "misconfigured"


async def test_a_cancelled_round_leaves_no_question_behind() -> None:
    probe = probe_of(Wire(tags=silence, ps=silence, version=silence), timeout_seconds=60.0)
    before = asyncio.all_tasks()
    round_ = asyncio.ensure_future(probe.probe())
    await asyncio.sleep(0.01)

    round_.cancel()
    await asyncio.wait({round_})

    assert round_.cancelled()
    assert asyncio.all_tasks() == before


# ----------------------------------------------------------------------- headers


async def test_a_nodes_headers_go_to_it_and_credentials_into_no_reason() -> None:
    node = Node("http://me:sesame@rig/behind", headers={"x-team": "blue", "accept": "a/b"})
    wire = Wire(tags=httpx.Response(401, text="sesame"))

    seen = await probe_of(wire, node).probe()

    for request in wire.requests:
        assert str(request.url).startswith("http://rig/behind/api/")
        assert request.headers["Authorization"].startswith("Basic ")
        assert request.headers["X-Team"] == "blue"
        assert request.headers.get_list("Accept") == ["a/b"]
    assert "sesame" not in repr(seen)


async def test_a_header_that_http_cannot_carry_is_misconfigured_and_not_shown() -> None:
    node = Node("http://rig", headers={"Authorization": "Bearer sés\u0142ame"})

    health, reason = verdict(await look(node))

    assert (health, reason) == ("misconfigured", "its configured URL or headers cannot be sent")


# -------------------------------------------------------------------------- show


async def test_what_show_tells_is_added_to_the_last_observation() -> None:
    wire = Wire()
    probe = probe_of(wire)
    first = await probe.probe()

    assert await probe.learn()
    more = probe.with_what_was_learned()

    assert more is not None
    model = (more.installed or {})["llama3:latest"]
    assert model.shape is not None
    assert model.shape.kv_bytes(256) == 256 * 2 * 4 * (16 + 16) * 2
    assert model.capabilities == frozenset({"completion", "tools"})
    assert model.context_length == 8192
    assert model.weights_file == "sha256-5ee4"
    assert (more.observed_at, more.loaded) == (first.observed_at, first.loaded)
    assert wire.asked("/show")[0].content == b'{"model":"llama3:latest"}'
    assert probe.with_what_was_learned() is None
    assert (await probe.probe()).installed == more.installed


async def test_one_answer_serves_the_whole_fleet() -> None:
    shown, wires = ShowCache(), (Wire(), Wire())
    one, other = (probe_of(wire, shown=shown) for wire in wires)
    await one.probe()
    await other.probe()

    assert await one.learn()
    assert not await other.learn()

    assert len(wires[1].asked("/show")) == 0
    assert other.with_what_was_learned() is not None


async def test_another_digest_under_the_same_name_is_asked_about_again() -> None:
    wire = Wire()
    probe = probe_of(wire)
    await probe.probe()
    await probe.learn()
    wire.answers["tags"] = {"models": [{"name": "llama3", "digest": "d2"}]}
    await probe.probe()

    assert await probe.learn()


async def test_a_model_that_could_not_be_shown_is_left_alone_for_a_minute() -> None:
    clock, wire = Clock(), Wire(show=httpx.Response(500))
    probe = probe_of(wire, clock=clock)
    await probe.probe()

    assert [await probe.learn(), await probe.learn()] == [False, False]
    assert len(wire.asked("/show")) == 1
    wire.answers["show"] = SHOW
    clock.now += SHOW_RETRY_SECONDS
    assert await probe.learn()


async def test_a_node_that_has_other_models_each_time_fills_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shown_module, "MOST_ENTRIES", 10)
    shown, wire = ShowCache(), Wire()
    probe = probe_of(wire, shown=shown)
    for number in range(50):
        wire.answers["tags"] = {"models": [{"name": "llama3", "digest": f"d{number}"}]}
        await probe.probe()
        assert await probe.learn()

    assert len(shown) == 10
    assert probe.with_what_was_learned() is not None


async def test_a_model_without_digest_is_not_asked_about() -> None:
    probe = probe_of(Wire(tags={"models": [{"name": "x"}]}))
    await probe.probe()

    assert not await probe.learn()


# -------------------------------------------------------------------------- local


class Gpus(NvmlReader):
    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__()
        self.answer = read
        self.readings = 0
        self.is_closed = False

    def read(self, now: float) -> Any:
        self.readings += 1
        return self.answer()

    def close(self) -> None:
        self.is_closed = True


def host(now: float) -> HostMemory:
    return HostMemory(total_bytes=64 * GB, observed_at=now)


async def test_a_node_on_this_machine_is_measured() -> None:
    local = LocalMemory(clock=Clock(), reader=Gpus(lambda: ((), ("none",))), host=host)

    seen = await probe_of(Wire(), local=local, timeout_seconds=5.0).probe()

    assert seen.devices == ()
    assert seen.host == HostMemory(total_bytes=64 * GB, observed_at=100.0)


async def test_one_reading_serves_all_nodes_for_a_second() -> None:
    clock, gpus = Clock(), Gpus(lambda: ((), ()))
    local = LocalMemory(clock=clock, reader=gpus, host=host)

    await asyncio.gather(*(local.read(5.0) for _ in range(3)))
    await local.read(5.0)
    assert gpus.readings == 1
    clock.now += 1.0
    await local.read(5.0)
    assert gpus.readings == 2


async def test_a_driver_that_hangs_is_not_waited_for_nor_asked_twice() -> None:
    release = threading.Event()
    gpus = Gpus(lambda: (release.wait(10.0), ((), ()))[1])
    local = LocalMemory(clock=Clock(), reader=gpus, host=host)

    probe = probe_of(Wire(), local=local, timeout_seconds=SOON)
    seen = [await probe.probe(), await probe.probe()]
    local.close()
    release.set()

    assert [one.health for one in seen] == ["up", "up"]
    assert seen[0].devices is None
    assert (gpus.readings, gpus.is_closed) == (1, False)


async def test_a_reading_that_fails_is_a_reason() -> None:
    local = LocalMemory(clock=Clock(), reader=Gpus(lambda: 1 / 0), host=host)

    reading = await local.read(5.0)

    assert (reading.devices, reading.reasons) == (None, ("ZeroDivisionError",))


async def test_how_long_a_model_stays_when_idle_shows_in_two_looks() -> None:
    clock, wall_clock = Clock(), Clock()

    def ps(expires_in: float) -> Any:
        at = datetime.fromtimestamp(wall_clock.now + expires_in, timezone.utc)
        return {"models": [{**PS["models"][0], "expires_at": at.isoformat()}]}

    async def keep_alive() -> float | None:
        return (await probe.probe()).loaded["llama3:latest"].keep_alive_seconds  # type: ignore[index]

    wall_clock.now = 1_800_000_000.0
    wire = Wire(ps=ps(50.0))
    probe = probe_of(wire, clock=clock, wall_clock=wall_clock)
    assert await keep_alive() == 60.0  # what people set

    clock.now, wall_clock.now = clock.now + 5.0, wall_clock.now + 5.0
    wire.answers["ps"] = ps(87.0)  # it was used three seconds ago
    assert await keep_alive() == 90.0
