"""Exporters on real ports: what a router makes of them."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hydra_llm import HydraSettings, Node, Router
from hydra_llm.probes.collector import Collector
from hydra_llm.testing import SimulatedCluster, SimulatedModel, SimulatedNode
from hydra_llm.types import GB, Observation
from tests.helpers import full_queue

MIB = 1 << 20
BIG = "llama3.1:70b"
LLAMA = "llama3.2:3b"
TOKEN = "sesame"

Answer = Callable[[BaseHTTPRequestHandler], None]


def dcgm(total_gb: float, free_gb: float) -> str:
    free, used = (round(gb * GB / MIB) for gb in (free_gb, total_gb - free_gb))
    labels = '{gpu="0",UUID="GPU-1",modelName="NVIDIA"}'
    return f"DCGM_FI_DEV_FB_FREE{labels} {free}\nDCGM_FI_DEV_FB_USED{labels} {used}\n"


def says(text: str, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        body = text.encode()
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


class Exporter:
    """A server that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.leave = threading.Event()
        """Set at the end: answers that hang come back."""
        self.url = ""


@contextmanager
def exporting(answer: Answer | None) -> Iterator[Exporter]:
    """An exporter with this answer; with none it hangs."""
    exporter = Exporter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            exporter.asked.append((self.path, self.headers["Authorization"]))
            if answer is None:
                exporter.leave.wait(30.0)
            else:
                answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *about: None  # type: ignore[method-assign]  # clients leave
    server.daemon_threads = False  # so that closing waits for them
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="exporter")
    thread.start()
    exporter.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield exporter
    finally:
        exporter.leave.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def routing(*nodes: Node, **settings: Any) -> Iterator[Router]:
    about = {"health_check_interval": 60.0, "health_check_timeout": 5.0, **settings}
    with Router(settings=HydraSettings(nodes=nodes, **about)) as router:
        yield router


@pytest.fixture
def ollama() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", models=[LLAMA], vram_gb=24) as running:
        yield running


def resources(router: Router, node_id: str = "a") -> dict[str, Any]:
    return next(one for one in router.get_node_resources() if one["id"] == node_id)


# ------------------------------------------------------------------------ what it is for


def test_a_routers_figures_and_decisions_are_those_of_the_exporter(ollama: SimulatedNode) -> None:
    with exporting(says(dcgm(24, 6.5))) as exporter:
        node = ollama.node(vram_gb=None, exporter=exporter.url, local=False)
        with routing(node) as router:
            told = resources(router)
            enough = router.explain(LLAMA, min_vram_gb=6, vram="require")
            too_much = router.explain(LLAMA, min_vram_gb=7, vram="require")

    assert (told["vram_total_gb"], told["vram_available_gb"]) == (
        pytest.approx(24, abs=0.01),
        pytest.approx(6.5, abs=0.01),
    )
    assert told["vram_source"] == "dcgm-exporter"
    assert told["vram_age_s"] == pytest.approx(30.0, abs=2.0)
    assert enough.selected_node == "a"
    assert too_much.selected_node is None
    assert "a: 6.5 GB VRAM available" in too_much.reason
    assert {path for path, _ in exporter.asked} == {"/metrics"}


def test_a_70b_model_that_fits_nowhere_goes_to_the_machine_with_the_most_room() -> None:
    # 40 GB on disk: nobody has 35 GB free, and all figures come from exporters.
    room = {"local": (8.0, 0.0), "A": (24.0, 20.0), "B": (12.0, 10.0)}
    model = SimulatedModel(BIG, size_gb=40.0, block_count=80)
    machines = [
        SimulatedNode(name, models=[model], vram_gb=total, used_vram_gb=total - free, ram_gb=128.0)
        for name, (total, free) in room.items()
    ]
    with (
        SimulatedCluster(machines) as cluster,
        exporting(says(dcgm(*room["local"]))) as local,
        exporting(says(dcgm(*room["A"]))) as a,
        exporting(says(dcgm(*room["B"]))) as b,
    ):
        urls = {"local": local.url, "A": a.url, "B": b.url}
        nodes = [
            one.node(vram_gb=None, exporter=urls[one.id], local=one.id == "local")
            for one in cluster
        ]
        with routing(*nodes) as router:
            router.refresh(timeout=30)
            decision = router.explain(BIG, min_vram_gb=35)
            sources = {one["id"]: one["vram_source"] for one in router.get_node_resources()}

    assert sources == dict.fromkeys(room, "dcgm-exporter")
    assert decision.selected_node == "A"
    assert (
        "no node has 35.0 GB VRAM available (local 0.0 GB, A 20.0 GB, B 10.0 GB); "
        "took the best that could run it"
    ) in decision.reason


# ------------------------------------------------------------------------ what goes wrong


def test_credentials_in_its_url_or_beside_it_let_us_in(ollama: SimulatedNode) -> None:
    right = {"Basic bWU6c2VzYW1l", f"Bearer {TOKEN}"}  # of me:sesame

    def guarded(request: BaseHTTPRequestHandler) -> None:
        is_right = request.headers["Authorization"] in right
        says(dcgm(24, 6.5) if is_right else TOKEN, 200 if is_right else 401)(request)

    with exporting(guarded) as exporter:
        ways = {
            "stranger": ollama.node(id="stranger", exporter=exporter.url),
            "basic": ollama.node(id="basic", exporter=exporter.url.replace("//", f"//me:{TOKEN}@")),
            "bearer": ollama.node(
                id="bearer",
                exporter=exporter.url,
                exporter_headers={"Authorization": f"Bearer {TOKEN}"},
            ),
        }
        seen = {}
        for name, node in ways.items():
            with routing(node) as router:
                seen[name] = resources(router, name)["vram_source"]
                assert TOKEN not in f"{router.settings!r} {router.nodes()!r} {node!r}"

    assert seen["basic"].startswith("dcgm-exporter")
    assert seen["bearer"].startswith("dcgm-exporter")
    assert "refuses access (401)" in seen["stranger"]
    assert TOKEN not in str(seen)


def test_a_redirect_leads_nowhere(ollama: SimulatedNode) -> None:
    with exporting(says(dcgm(24, 6.5))) as elsewhere:
        with exporting(says("", 307, Location=f"{elsewhere.url}/metrics")) as exporter:
            with routing(ollama.node(exporter=exporter.url)) as router:
                assert "redirects (307)" in resources(router)["vram_source"]

    assert elsewhere.asked == []


def test_a_body_without_an_end_is_left_at_the_limit(ollama: SimulatedNode) -> None:
    sent = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        request.end_headers()
        while True:  # until the connection is closed on us
            request.wfile.write(b"# \n" * 100_000)
            sent += 300_000

    with exporting(endless) as exporter:
        with routing(ollama.node(exporter=exporter.url), health_check_timeout=30.0) as router:
            seen = router.refresh()
            while "not answered yet" in str(seen[0].vram_source):
                seen = router.refresh()

    assert "its page is larger than 8 MiB" in str(seen[0].vram_source)
    # What was on its way when the limit was reached comes on top, each time that it is asked.
    assert sent < (len(exporter.asked) + 1) * (32 << 20)


@contextmanager
def watching(node: Node, **about: Any) -> Iterator[list[tuple[float, Observation]]]:
    """Rounds without a pause between them, each with the seconds since the one before."""
    seen: list[tuple[float, Observation]] = []
    last = time.monotonic()

    def note(one: Observation) -> None:
        nonlocal last
        now = time.monotonic()
        seen.append((now - last, one))
        last = now

    options = {"interval_seconds": 60.0, "timeout_seconds": 1.0, **about}
    collector = Collector([node], note, **options)
    collector.start()
    try:
        collector.wait_first(5.0)
        for _ in range(6):
            assert collector.refresh_and_wait(timeout_seconds=10.0)
        yield seen
    finally:
        collector.stop()


def test_an_exporter_that_hangs_holds_up_one_round_for_half_a_second(
    ollama: SimulatedNode,
) -> None:
    with exporting(None) as exporter:
        with watching(ollama.node(vram_gb=24, exporter=exporter.url)) as seen:
            rounds = list(seen)

    assert {one.health for _, one in rounds} == {"up"}
    assert {one.health_reason for _, one in rounds} == {""}
    assert all((one.vram_source or "").startswith("config - /api/ps") for _, one in rounds)
    assert "exporter: it has not answered yet" in (rounds[0][1].vram_source or "")
    # Seven rounds, each of which would have waited a second for it.
    assert sum(seconds for seconds, _ in rounds) < 3.0


def test_a_port_where_nobody_answers_costs_a_reason(ollama: SimulatedNode) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    with routing(ollama.node(vram_gb=24, exporter=f"127.0.0.1:{port}")) as router:
        told = resources(router)
        [snapshot] = router.nodes()

    assert (told["healthy"], told["health_reason"]) == (True, "")
    assert told["vram_available_gb"] == 24.0
    assert told["vram_source"] == "config - /api/ps (exporter: connection refused)"
    assert "exporter: connection refused" in snapshot.vram_reasons


def test_https_is_spoken_to_an_exporter_whose_node_speaks_none(ollama: SimulatedNode) -> None:
    made: list[ssl.SSLContext] = []

    def context() -> ssl.SSLContext:
        made.append(ssl.create_default_context())
        return made[-1]

    with exporting(says(dcgm(24, 6.5))) as exporter:
        node = ollama.node(exporter=exporter.url.replace("http:", "https:"))
        with watching(node, ssl_context=context) as seen:
            assert "exporter: the TLS handshake failed" in (seen[-1][1].vram_source or "")

    assert len(made) == 1
    assert exporter.asked == []


def test_without_monitoring_nobody_asks_it(ollama: SimulatedNode) -> None:
    with exporting(says(dcgm(24, 6.5))) as exporter:
        with routing(ollama.node(exporter=exporter.url), vram_monitoring=False) as router:
            router.refresh()

    assert exporter.asked == []


def test_a_slow_page_comes_in_with_the_round_after_it(ollama: SimulatedNode) -> None:
    released = threading.Event()

    def slowly(request: BaseHTTPRequestHandler) -> None:
        released.wait(10.0)
        says(dcgm(24, 6.5))(request)

    with exporting(slowly) as exporter:
        with routing(ollama.node(exporter=exporter.url), health_check_timeout=10.0) as router:
            early = resources(router)["vram_source"]
            released.set()
            deadline = time.monotonic() + 10.0
            while (late := resources(router)["vram_source"]) == early:
                assert time.monotonic() < deadline
                router.refresh()

    assert "not answered yet" in early
    assert late == "dcgm-exporter"


@contextmanager
def unanswered() -> Iterator[str]:
    """A port where connections are not even accepted."""
    with full_queue() as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def silent() -> Iterator[str]:
    """An exporter that hangs."""
    with exporting(None) as exporter:
        yield exporter.url


@pytest.mark.parametrize("hanging", [silent, unanswered])
def test_the_router_closes_while_a_page_is_on_its_way(
    ollama: SimulatedNode, caplog: pytest.LogCaptureFixture, hanging: Callable[[], Any]
) -> None:
    with hanging() as url:
        with routing(ollama.node(exporter=url), health_check_timeout=60.0) as router:
            [seen] = router.refresh()
            began = time.monotonic()
        # The watch on leftovers sees whether its connection stays behind.
        assert time.monotonic() - began < 5.0
    gc.collect()
    assert (seen.health, seen.vram_reasons[0]) == ("up", "exporter: it has not answered yet")
    # Where asyncio tells of tasks that nobody ended.
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
