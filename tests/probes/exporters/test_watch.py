"""An exporter beside the rounds of probes, over a transport without sockets."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path
from types import FunctionType
from typing import Any

import httpx
import pytest

from hydra_llm.probes.exporters import ExporterWatch
from hydra_llm.probes.exporters.watch import KEPT_SECONDS, MAX_BODY_BYTES
from hydra_llm.probes.local import LocalMemory
from hydra_llm.probes.node import NodeProbe
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.probes.shown import ShowCache
from hydra_llm.types import GB, Device, HostMemory, Node, Observation

PAGES = {file.stem: file.read_text() for file in Path(__file__).parent.glob("pages/*.prom")}
AGENT_LOOKED_AT = 1_795_424_594.219613
SOON = 0.3
LATE = 5.0


class Wire(httpx.AsyncBaseTransport):
    """An exporter, and behind other paths an Ollama with nothing loaded."""

    def __init__(self, answer: Any = "dcgm-exporter-4.8") -> None:
        self.answer = answer
        self.asked: list[httpx.Request] = []
        self.pages = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.url.path.startswith("/api/"):
            about = {"version": "0.32.15", "models": []}
            return httpx.Response(200, json=about)
        self.pages += 1
        answer = self.answer
        if isinstance(answer, FunctionType):
            answer = await answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else page(answer)


def page(name: str, **headers: str) -> httpx.Response:
    return httpx.Response(200, text=PAGES[name], headers=headers)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def silence(request: httpx.Request) -> None:
    await asyncio.Event().wait()


def node(exporter: str = "http://rig:9400", **about: Any) -> Node:
    return Node("http://rig:11434", id="rig", exporter=exporter, **{"local": False, **about})


def watch_of(wire: Wire, own: Node | None = None, **about: Any) -> ExporterWatch:
    return ExporterWatch(
        own or node(), wire, **{"timeout_seconds": LATE, "clock": Clock(), **about}
    )


def probe_of(
    wire: Wire, own: Node | None = None, *, local: LocalMemory | None = None, **about: Any
) -> NodeProbe:
    own = own or node()
    clock = about.get("clock") or Clock()
    return NodeProbe(
        own,
        wire,
        shown=ShowCache(),
        local=local,
        exporter=watch_of(wire, own, **{**about, "clock": clock}),
        timeout_seconds=LATE,
        clock=clock,
    )


async def look(wire: Wire, own: Node | None = None, **about: Any) -> Observation:
    probe = probe_of(wire, own, **about)
    try:
        return await probe.probe()
    finally:
        await end(probe._exporter)


async def end(watch: ExporterWatch | None) -> None:
    pending = list(watch.under_way) if watch is not None else []
    for one in pending:
        one.cancel()
    if pending:
        await asyncio.wait(pending)


async def told(wire: Wire, **about: Any) -> tuple[str, tuple[str, ...]]:
    """The trouble with an exporter, and all that is wrong with it."""
    watch = watch_of(wire, **about)
    watch.begin()
    exported = await watch.latest()
    await end(watch)
    return exported.trouble, exported.reasons


# ----------------------------------------------------------------------- what is seen


async def test_a_nodes_free_memory_is_what_its_exporter_tells() -> None:
    seen = await look(Wire())

    assert seen.free_vram_bytes == (61262 + 81079) << 20
    assert seen.total_vram_bytes == 2 * (61262 + 19818 + 479) << 20
    assert (seen.vram_source, seen.vram_reasons) == ("dcgm-exporter", ())
    assert [one.source for one in seen.devices or ()] == ["dcgm-exporter"] * 2


async def test_an_exporter_goes_before_the_driver_and_the_driver_before_what_is_configured() -> (
    None
):
    class Driver(NvmlReader):
        def read(self, now: float) -> Any:
            own = Device(
                key="x", vendor="nvidia", total_bytes=8 * GB, free_bytes=5 * GB, source="nvml",
                observed_at=now,
            )  # fmt: skip
            return (own,), ()

    def local() -> LocalMemory:
        return LocalMemory(clock=Clock(), reader=Driver(), host=lambda now: HostMemory())

    here = node(vram_gb=500)
    by_exporter = await look(Wire(), here, local=local())
    by_driver = await look(Wire(httpx.Response(404)), here, local=local())
    by_config = await look(Wire(httpx.Response(404)), here)

    assert by_exporter.vram_source == "dcgm-exporter"
    assert by_driver.free_vram_bytes == 5 * GB
    assert by_driver.vram_source == "nvml (exporter: it answers with status 404)"
    assert by_config.free_vram_bytes == 500 * GB
    assert by_config.vram_source == "config - /api/ps (exporter: it answers with status 404)"


async def test_without_any_other_source_the_trouble_is_the_source() -> None:
    seen = await look(Wire(httpx.Response(500)))

    assert (seen.total_vram_bytes, seen.free_vram_bytes) == (None, None)
    assert seen.vram_source == "exporter: it answers with status 500"
    assert seen.vram_reasons == ("exporter: it answers with status 500",)


async def test_the_host_of_an_exporter_is_the_nodes() -> None:
    seen = await look(Wire("node-exporter-cpu-only"))

    assert seen.host is not None
    assert (seen.host.total_bytes, seen.host.observed_at) == (33_594_830_848, 100.0)
    assert seen.free_vram_bytes is None
    assert "--collector.drm" in (seen.vram_source or "")


async def test_a_page_that_lacks_something_says_so_and_serves() -> None:
    torn = httpx.Response(200, text=PAGES["dcgm-exporter-4.8"] + 'DCGM_FI_DEV_FB_FREE{"\n')

    seen = await look(Wire(torn))

    assert seen.vram_source == "dcgm-exporter"
    assert seen.vram_reasons == ("exporter: 1 of its lines cannot be read",)


async def test_credentials_of_the_exporter_go_to_it_alone_and_into_no_text() -> None:
    own = node("http://me:sesame@rig:9400/metrics", headers={"X-Key": "k"})
    wire = Wire(httpx.Response(401, text="sesame"))

    seen = await look(wire, own)

    for request in wire.asked:
        is_page = request.url.path == "/metrics"
        assert ("Authorization" in request.headers) == is_page
        assert ("X-Key" in request.headers) != is_page
        assert "sesame" not in str(request.url)
    assert "sesame" not in f"{own!r} {seen!r}"
    assert seen.vram_source == (
        "exporter: it refuses access (401); check Node(exporter_headers=...)"
    )


# -------------------------------------------------------------------------------- age


@pytest.mark.parametrize(
    ("name", "age"),
    [
        ("dcgm-exporter-4.8", 30.0),
        ("all-smi-nvidia", 3.0),
        ("nvitop-exporter", 1.0),
        ("nvidia_gpu_exporter-h100-load", 0.0),
    ],
)
async def test_figures_are_as_old_as_the_exporters_habit_makes_them(name: str, age: float) -> None:
    seen = await look(Wire(name))

    assert (seen.observed_at, seen.vram_observed_at) == (100.0, 100.0 - age)


async def test_a_page_is_as_old_as_its_question() -> None:
    clock = Clock()

    async def later(request: httpx.Request) -> httpx.Response:
        clock.now += 2.0
        return page("nvidia_gpu_exporter-h100-load")

    assert (await look(Wire(later), clock=clock)).vram_observed_at == 100.0


@pytest.mark.parametrize(("ahead", "age"), [(0.5, 0.0), (4.0, 3.78), (-3600.0, 0.0)])
async def test_our_agents_own_clock_tells_the_age_whatever_ours_says(
    ahead: float, age: float
) -> None:
    date = formatdate(AGENT_LOOKED_AT + ahead, usegmt=True)

    # By our clock it would be a year.
    seen = await look(
        Wire(page("hydra-agent", Date=date)), wall_clock=lambda: AGENT_LOOKED_AT + 3e7
    )

    assert seen.vram_observed_at == pytest.approx(100.0 - age, abs=0.01)
    assert seen.vram_reasons == ()


async def test_a_sample_of_an_hour_ago_is_of_no_use() -> None:
    date = formatdate(AGENT_LOOKED_AT + 3600, usegmt=True)

    seen = await look(Wire(page("hydra-agent", Date=date)))

    assert (seen.free_vram_bytes, seen.host) == (None, None)
    assert "hydra-agent last read the GPUs 3600 s ago" in (seen.vram_source or "")


@pytest.mark.parametrize(
    ("ours", "age", "is_doubtful"),
    [(7.5, 7.5, False), (-7.5, 0.0, False), (-3600.0, 0.0, True), (3600.0, 0.0, True)],
)
@pytest.mark.parametrize("date", [None, "yesterday"])
async def test_without_its_clock_ours_must_do_within_reason(
    date: str | None, ours: float, age: float, is_doubtful: bool
) -> None:
    answer = page("hydra-agent") if date is None else page("hydra-agent", Date=date)

    seen = await look(Wire(answer), wall_clock=lambda: AGENT_LOOKED_AT + ours)

    assert seen.vram_observed_at == pytest.approx(100.0 - age)
    assert bool(seen.vram_reasons) == is_doubtful


# ---------------------------------------------------------------------------- troubles


def refused() -> Exception:
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "x")
    return error


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (refused(), "connection refused"),
        (httpx.ReadError("x"), "the connection broke"),
        (httpx.Response(302, headers={"Location": "http://elsewhere/"}), "it redirects (302)"),
        (httpx.Response(403), "it refuses access (403); check Node(exporter_headers=...)"),
        (httpx.Response(503), "it answers with status 503"),
        (httpx.Response(204), "it answers with status 204"),
        (httpx.Response(200, html="<p>"), "it is a web page; metrics are as a rule at /metrics"),
        (httpx.Response(200, content=b"\xff\xfe\x00"), "it is of no exporter that is known here"),
        (httpx.LocalProtocolError("b'sesame'"), "its configured URL or headers cannot be sent"),
        (RuntimeError("sesame"), "it could not be asked (RuntimeError)"),
        ("all-smi-not-ready", "all-smi: it has not read the GPUs yet"),
    ],
    ids=str,
)
async def test_each_trouble_is_told(answer: Any, why: str) -> None:
    trouble, reasons = await told(Wire(answer))

    assert trouble.startswith(why)
    assert len(reasons) == 1
    assert "sesame" not in trouble


async def test_a_redirect_is_not_followed() -> None:
    wire = Wire(httpx.Response(302, headers={"Location": "http://elsewhere/metrics"}))

    await told(wire)

    assert [request.url.host for request in wire.asked] == ["rig"]


async def test_a_body_beyond_the_limit_is_not_read_to_its_end() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b"x" * (1 << 20)

    trouble, _ = await told(Wire(httpx.Response(200, content=endless())))

    assert trouble == "its page is larger than 8 MiB"
    assert sent == MAX_BODY_BYTES + (1 << 20)


async def test_a_body_that_trickles_in_does_not_outlast_the_timeout() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"\n"
            await asyncio.sleep(0.01)

    trouble, _ = await told(Wire(httpx.Response(200, content=trickle())), timeout_seconds=SOON)

    assert trouble == "it gave no answer in 0.3 s"


async def test_a_page_that_our_own_code_falls_over_costs_the_node_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fall(text: str) -> None:
        raise KeyError(text)

    monkeypatch.setattr("hydra_llm.probes.exporters.watch.read_page", fall)

    seen = await look(Wire())

    assert (seen.health, seen.health_reason) == ("up", "")
    assert seen.vram_source == "exporter: its page could not be read (KeyError)"


# ------------------------------------------------------------------- it delays nothing


async def test_an_exporter_that_hangs_costs_one_short_wait_and_then_none() -> None:
    wire, clock = Wire(silence), Clock()
    probe = probe_of(wire, clock=clock, timeout_seconds=60.0)
    now = asyncio.get_running_loop().time
    took = []
    for _ in range(4):
        began = now()
        seen = await probe.probe()
        took.append(now() - began)
        assert (seen.health, seen.vram_source) == ("up", "exporter: it has not answered yet")

    assert took[0] < LATE
    assert max(took[1:]) < 0.4
    # No second question beside the first.
    assert wire.pages == 1
    await end(probe._exporter)


async def test_a_page_that_comes_after_its_round_serves_the_next_one() -> None:
    clock, come = Clock(), asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        await come.wait()
        return page("nvidia_gpu_exporter-h100-load")

    wire = Wire(slowly)
    probe = probe_of(wire, clock=clock)
    first = await probe.probe()
    come.set()
    await asyncio.wait(list(probe._exporter.under_way) if probe._exporter else [])
    come.clear()
    clock.now = 105.0

    second = await probe.probe()

    assert first.free_vram_bytes is None
    assert (second.observed_at, second.vram_observed_at) == (105.0, 100.0)
    assert (second.vram_source, second.vram_reasons) == ("nvidia_gpu_exporter", ())
    await end(probe._exporter)


async def test_a_page_is_asked_for_anew_each_round() -> None:
    clock, wire = Clock(), Wire()
    probe = probe_of(wire, clock=clock)
    ages = []
    for clock.now in (100.0, 105.0, 110.0):
        ages.append((await probe.probe()).vram_observed_at)

    assert ages == [70.0, 75.0, 80.0]
    assert wire.pages == 3


async def test_what_it_last_told_serves_for_a_while_with_its_age() -> None:
    clock, wire = Clock(), Wire("nvidia_gpu_exporter-h100-load")
    probe = probe_of(wire, clock=clock)
    first = await probe.probe()
    wire.answer = refused()
    clock.now = 100.0 + KEPT_SECONDS

    kept = await probe.probe()
    clock.now += 1.0
    gone = await probe.probe()

    assert kept.free_vram_bytes == first.free_vram_bytes
    assert kept.vram_observed_at == 100.0
    assert kept.vram_source == "nvidia_gpu_exporter (exporter: connection refused)"
    assert gone.free_vram_bytes is None
    assert gone.vram_source == "exporter: connection refused"


async def test_a_page_without_memory_takes_the_place_of_one_with_some() -> None:
    clock, wire = Clock(), Wire("nvidia_gpu_exporter-h100-load")
    probe = probe_of(wire, clock=clock)
    await probe.probe()
    text = PAGES["nvidia_gpu_exporter-h100-load"]
    wire.answer = httpx.Response(200, text=text.replace("success 1", "success 0"))

    seen = await probe.probe()

    assert seen.free_vram_bytes is None
    assert seen.vram_source == "exporter: nvidia_gpu_exporter: its last nvidia-smi failed"


async def test_a_node_that_is_down_does_not_wait_for_its_exporter() -> None:
    class Dead(Wire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path.startswith("/api/"):
                raise refused()
            return await super().handle_async_request(request)

    probe = probe_of(Dead(silence), timeout_seconds=60.0)

    seen = await asyncio.wait_for(probe.probe(), LATE)

    assert (seen.health, seen.health_reason) == ("down", "connection refused")
    await end(probe._exporter)


async def test_the_page_is_asked_for_while_the_node_is() -> None:
    arrived: list[str] = []
    both = asyncio.Event()

    class Together(Wire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            arrived.append(request.url.path)
            if {"/metrics", "/api/tags"} <= set(arrived):
                both.set()
            await asyncio.wait_for(both.wait(), LATE)
            return await super().handle_async_request(request)

    assert (await look(Together())).health == "up"


# ------------------------------------------------------------------------- its address


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://rig:9400", "http://rig:9400/metrics"),
        ("http://rig:9400/", "http://rig:9400/metrics"),
        ("rig:9400", "http://rig:9400/metrics"),
        ("https://rig", "https://rig:443/metrics"),
        ("http://rig:9400/v1/x", "http://rig:9400/v1/x"),
        ("http://[::1]:9400", "http://[::1]:9400/metrics"),
        ("http://0.0.0.0:9400", "http://127.0.0.1:9400/metrics"),
        ("http://rig:9100/metrics?collect[]=drm", "http://rig:9100/metrics?collect[]=drm"),
    ],
)
async def test_the_page_is_at_metrics_unless_a_path_is_named(given: str, asked: str) -> None:
    own = node(given)
    wire = Wire()

    await look(wire, own)

    assert own.exporter == asked
    pages = [request.url for request in wire.asked if not request.url.path.startswith("/api/")]
    assert pages == [httpx.URL(asked)]


def test_a_bearer_token_goes_as_a_header_and_is_not_shown() -> None:
    own = node(exporter_headers={"Authorization": "Bearer sesame"})

    assert own.exporter_headers == {"Authorization": "Bearer sesame"}
    assert "exporter_headers={'Authorization': '***'}" in repr(own)
    assert hash(own) == hash(node(exporter_headers={"Authorization": "Bearer sesame"}))


def test_a_header_that_is_named_goes_before_the_urls_credentials() -> None:
    own = node("http://me:x@rig:9400", exporter_headers={"authorization": "Bearer y"})

    assert own.exporter_headers == {"authorization": "Bearer y"}


def test_a_token_in_the_query_is_not_shown() -> None:
    assert "sesame" not in repr(node("http://rig:9400/metrics?token=sesame"))


def test_a_node_without_an_exporter_has_none() -> None:
    assert [Node("rig", exporter=none).exporter for none in (None, "")] == [None, None]
