"""The collector's thread, on real sockets."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from hydra_llm.probes import thread as thread_module
from hydra_llm.probes.collector import Collector
from hydra_llm.probes.thread import Errands
from hydra_llm.testing import HtmlFault, HugeFault, PsFault, SimulatedNode, StatusFault
from hydra_llm.types import Node, Observation
from tests.helpers import full_queue

LLAMA = "llama3.2:3b"


class Seen:
    """Takes observations in, and waits for what they should come to say."""

    def __init__(self) -> None:
        self.all: list[Observation] = []
        self._changed = threading.Condition()

    def __call__(self, seen: Observation) -> None:
        with self._changed:
            self.all.append(seen)
            self._changed.notify_all()

    def of(self, node_id: str) -> list[Observation]:
        return [seen for seen in self.all if seen.node_id == node_id]

    def health(self, node_id: str) -> str:
        seen = self.of(node_id)
        return seen[-1].health if seen else "unknown"

    def wait(self, until: Callable[[], bool], seconds: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(until, seconds), self.all[-3:]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    with SimulatedNode("a", models=[LLAMA], vram_gb=24) as running:
        yield running


@contextmanager
def collecting(
    seen: Callable[[Observation], object], *nodes: Node, **about: Any
) -> Iterator[Collector]:
    options = {"interval_seconds": 60.0, "timeout_seconds": 5.0, "monitor_vram": False, **about}
    collector = Collector(nodes, seen, **options)
    try:
        yield collector
    finally:
        collector.stop()


def at(running: SimulatedNode, **about: Any) -> Node:
    return Node(running.url, id=running.id, **about)


@contextmanager
def mute() -> Iterator[Node]:
    """The system accepts connections, and nobody ever answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield Node(f"http://127.0.0.1:{listening.getsockname()[1]}", id="mute")


@contextmanager
def black_hole() -> Iterator[Node]:
    """Connections are not even accepted."""
    with full_queue() as port:
        yield Node(f"http://127.0.0.1:{port}", id="hole")


def refusing() -> Node:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    return Node(f"http://127.0.0.1:{port}", id="refusing")


def collector_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("hydra-llm")]


def becomes(so: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it is so in that time; the other end of a connection closes when it can."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if so():
            return True
        time.sleep(0.005)
    return False


# ---------------------------------------------------------------------- life cycle


def test_nothing_runs_before_it_is_started_and_one_thread_after(
    seen: Seen, node: SimulatedNode
) -> None:
    with collecting(seen, at(node)) as collector:
        collector.refresh()
        assert (collector_threads(), repr(collector)) == ([], "<Collector not started | 1 nodes>")

        collector.start()
        collector.start()
        collector.wait_first(5.0)

        assert collector_threads() == ["hydra-llm-collector"]
        assert repr(collector) == "<Collector running | 1 nodes>"
    assert not collector_threads()
    assert becomes(lambda: not node.open_connections)


def test_stopped_is_final_and_may_be_said_twice(seen: Seen, node: SimulatedNode) -> None:
    with collecting(seen, at(node)) as collector:
        collector.wait_first(5.0)
        collector.stop()
        collector.stop()

        collector.start()
        collector.refresh()
        collector.wait_first(5.0)

        assert collector.refresh_and_wait(timeout_seconds=5.0) is False
        assert (collector_threads(), repr(collector)) == ([], "<Collector stopped | 1 nodes>")


def test_it_stops_at_once_while_a_node_hangs(seen: Seen) -> None:
    with mute() as hung, collecting(seen, hung, timeout_seconds=60.0) as collector:
        collector.wait_first(0.1)
        began = time.monotonic()
        collector.stop()

        assert time.monotonic() - began < 2.0


def test_who_waits_is_told_when_it_stops() -> None:
    answers: list[bool] = []
    with mute() as hung, collecting(Seen(), hung, timeout_seconds=60.0) as collector:
        collector.wait_first(0.1)
        waiting = threading.Thread(
            target=lambda: answers.append(collector.refresh_and_wait(timeout_seconds=60.0))
        )
        waiting.start()
        time.sleep(0.05)
        collector.stop()
        waiting.join(5.0)

    assert answers == [False]


def test_it_may_be_stopped_from_its_own_thread(node: SimulatedNode) -> None:
    stopped = threading.Event()

    def stop(seen: Observation) -> None:
        collector.stop()
        stopped.set()

    with collecting(stop, at(node)) as collector:
        collector.start()
        assert stopped.wait(5.0)


def test_one_that_is_forgotten_ends_its_thread(seen: Seen, node: SimulatedNode) -> None:
    collector = Collector([at(node)], seen, monitor_vram=False)
    collector.wait_first(5.0)
    gone = weakref.ref(collector)

    del collector
    gc.collect()

    assert gone() is None
    assert becomes(lambda: not collector_threads())


def test_a_program_that_forgets_it_ends_without_a_word() -> None:
    program = """
import socket
from hydra_llm.probes.collector import Collector
from hydra_llm.types import Node
listening = socket.create_server(("127.0.0.1", 0))
node = Node(f"http://127.0.0.1:{listening.getsockname()[1]}")
collector = Collector([node], [].append, timeout_seconds=60.0)
collector.wait_first(0.2)
listening.close()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=30, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_anew_and_leaves_the_parent_alone(
    seen: Seen, node: SimulatedNode
) -> None:
    with collecting(seen, at(node), interval_seconds=0.05) as collector:
        collector.wait_first(5.0)
        read, write = os.pipe()
        if os.fork() == 0:  # the child
            try:
                before = len(seen.all)
                is_well = collector.refresh_and_wait(timeout_seconds=10.0)
                is_well = is_well and len(seen.all) > before and seen.health("a") == "up"
                collector.stop()
                os.write(write, b"well" if is_well else b"ill")
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as answer:  # noqa: PTH123  # a pipe has no path
            assert answer.read() == b"well"
        os.wait()

        assert collector.refresh_and_wait(timeout_seconds=10.0)
        assert seen.health("a") == "up"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_that_frees_it_takes_no_connection_from_the_parent(
    seen: Seen, node: SimulatedNode
) -> None:
    node.freeze()
    holder = [Collector([at(node)], seen, timeout_seconds=30.0, monitor_vram=False)]
    try:
        holder[0].start()
        assert becomes(lambda: node.open_connections >= 1)
        if (child := os.fork()) == 0:
            holder.clear()
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)

        node.thaw()
        holder[0].wait_first(5.0)
        assert seen.health("a") == "up"
    finally:
        holder[0].stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_start_leaves_the_child_no_locked_lock(seen: Seen) -> None:
    collector = Collector([], seen)
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with collector._lock:
            is_held.set()
            release.wait(10.0)

    holding = threading.Thread(target=hold)
    holding.start()
    assert is_held.wait(5.0)
    if (child := os.fork()) == 0:
        collector.stop()
        os._exit(0)
    assert becomes(lambda: os.waitpid(child, os.WNOHANG) != (0, 0))
    release.set()
    holding.join(5.0)
    collector.stop()


# ------------------------------------------------------------------- what it sees


def test_a_node_is_seen_with_its_models_and_what_show_adds(seen: Seen, node: SimulatedNode) -> None:
    node.preload(LLAMA)
    with collecting(seen, at(node, vram_gb=24.0)) as collector:
        collector.wait_first(5.0)
        seen.wait(lambda: len(seen.all) == 2)

    first, second = seen.all
    assert (first.health, first.version) == ("up", "0.32.15")
    assert list(first.loaded or ()) == list(first.installed or ()) == [LLAMA]
    assert first.vram_source == "config - /api/ps"
    shape = (second.installed or {})[LLAMA].shape
    assert shape is not None
    assert shape.kv_bytes(256) == 256 * 114_688


def test_the_machine_itself_is_measured_for_nodes_on_it(seen: Seen, node: SimulatedNode) -> None:
    with collecting(seen, at(node), at_other(node), monitor_vram=True) as collector:
        collector.wait_first(5.0)

    assert seen.of("a")[0].host is not None
    assert seen.of("other")[0].host is None


def at_other(running: SimulatedNode) -> Node:
    return Node(running.url, id="other", local=False)


def test_a_node_that_is_killed_is_down_and_serves_again_when_it_returns(
    seen: Seen, node: SimulatedNode
) -> None:
    with collecting(seen, at(node), interval_seconds=0.05) as collector:
        collector.start()
        seen.wait(lambda: seen.health("a") == "up")
        node.kill()
        seen.wait(lambda: seen.health("a") == "down")
        assert seen.all[-1].health_reason == "connection refused"
        node.revive()
        seen.wait(lambda: seen.health("a") == "up")


def test_a_frozen_node_is_down_and_up_when_it_thaws(seen: Seen, node: SimulatedNode) -> None:
    with collecting(seen, at(node), interval_seconds=0.05, timeout_seconds=0.2) as collector:
        collector.start()
        node.freeze()
        seen.wait(lambda: seen.health("a") == "down")
        assert "gave no answer in 0.2 s" in seen.all[-1].health_reason
        node.thaw()
        seen.wait(lambda: seen.health("a") == "up")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (StatusFault(status=401), "refuses access (401)"),
        (StatusFault(status=403), "refuses access (403)"),
        (StatusFault(status=307), "redirects (307)"),
        (HtmlFault(), "a web page"),
        (HugeFault(size_bytes=10_000_000), "no Ollama server sends"),
        (HugeFault(size_bytes=20_000_000), "larger than 16 MiB"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_ollama_server_is_misconfigured(
    seen: Seen, node: SimulatedNode, fault: Any, reason: str
) -> None:
    node.inject(fault, paths=("*",))
    with collecting(seen, at(node)) as collector:
        collector.wait_first(5.0)

    assert seen.health("a") == "misconfigured"
    assert reason in seen.all[0].health_reason


def test_ps_that_blocks_leaves_the_node_up(seen: Seen, node: SimulatedNode) -> None:
    node.inject(PsFault(block_s=60.0))
    with collecting(seen, at(node), timeout_seconds=0.3) as collector:
        collector.wait_first(5.0)

    assert (seen.health("a"), seen.all[0].loaded) == ("up", None)


def test_a_server_that_speaks_no_http_is_misconfigured(seen: Seen) -> None:
    def babble(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 smtp.example.org ESMTP\r\n\r\n")

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        speaking = threading.Thread(target=babble, args=(listening,))
        speaking.start()
        mail = Node(f"http://127.0.0.1:{listening.getsockname()[1]}", id="mail")
        with collecting(seen, mail) as collector:
            collector.wait_first(5.0)
        listening.shutdown(socket.SHUT_RDWR)
    speaking.join(5.0)

    assert seen.all[0].health_reason == "what it sends is not HTTP"
    assert seen.health("mail") == "misconfigured"


def test_https_to_a_plain_server_is_down_with_the_context_that_was_made_for_it(
    seen: Seen, node: SimulatedNode
) -> None:
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(ssl.create_default_context())
        return made[0]

    secure = Node(node.url.replace("http:", "https:"), id="tls")
    with collecting(seen, secure, ssl_context=make) as collector:
        collector.wait_first(5.0)

    assert len(made) == 1
    assert seen.health("tls") == "down"


def test_a_tls_handshake_that_hangs_leaves_no_connection_behind(seen: Seen) -> None:
    with mute() as hung:
        secure = Node(hung.url.replace("http:", "https:"), id="tls")
        with collecting(seen, secure, timeout_seconds=0.2, interval_seconds=0.1) as collector:
            collector.start()
            seen.wait(lambda: len(seen.all) >= 2)

    assert "gave no answer" in seen.all[0].health_reason


def test_no_tls_context_is_made_for_plain_nodes(seen: Seen, node: SimulatedNode) -> None:
    def make() -> ssl.SSLContext:
        raise AssertionError("not needed")

    with collecting(seen, at(node), ssl_context=make) as collector:
        collector.wait_first(5.0)

    assert seen.health("a") == "up"


def test_headers_go_to_their_node_alone_and_no_proxy_sees_them(
    seen: Seen, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, refusing().url)
    with (
        SimulatedNode("b") as other,
        collecting(seen, at(node, headers={"Authorization": "Bearer x"}), at(other)) as collector,
    ):
        assert collector.refresh_and_wait(timeout_seconds=5.0)
        sent = [{k.lower(): v for k, v in one.headers.items()} for one in node.requests]
        others = [{k.lower(): v for k, v in one.headers.items()} for one in other.requests]

    assert seen.health("a") == seen.health("b") == "up"
    assert all(headers["authorization"] == "Bearer x" for headers in sent)
    assert not any("authorization" in headers for headers in others)


# ---------------------------------------------------------- one that hangs, others


@pytest.mark.parametrize("hanging", [mute, black_hole])
def test_a_node_that_hangs_delays_no_other(seen: Seen, node: SimulatedNode, hanging: Any) -> None:
    with (
        hanging() as hung,
        collecting(seen, hung, at(node), interval_seconds=0.05, timeout_seconds=1.5) as collector,
    ):
        began = time.monotonic()
        collector.start()
        seen.wait(lambda: len(seen.of("a")) >= 5)

        assert time.monotonic() - began < 1.5
        assert not seen.of(hung.id)
        seen.wait(lambda: seen.health(hung.id) == "down")


def test_slow_look_ups_of_names_do_not_wait_for_one_another(
    seen: Seen, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, release = socket.getaddrinfo, threading.Event()

    def look_up(host: Any, *args: Any, **about: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name.startswith("slow"):
            release.wait(10.0)
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return real("127.0.0.1", *args, **about)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    slow = [Node(f"http://slow{number}:1", id=f"slow{number}") for number in range(40)]
    quick = Node(node.url.replace("127.0.0.1", "quick.local"), id="a")
    with collecting(seen, *slow, quick, timeout_seconds=30.0) as collector:
        collector.wait_first(5.0)
        assert seen.health("a") == "up"
        release.set()
        seen.wait(lambda: all(seen.health(one.id) == "down" for one in slow))
    assert seen.of("slow1")[0].health_reason == "its host name is unknown"


# ------------------------------------------------------------------ the first look


def first_look(seen: Seen, *nodes: Node, limit: float = 5.0) -> float:
    with collecting(seen, *nodes) as collector:
        began = time.monotonic()
        collector.wait_first(limit)
        return time.monotonic() - began


def test_the_first_look_ends_when_every_node_has_answered_or_failed(
    seen: Seen, node: SimulatedNode
) -> None:
    assert first_look(seen, at(node), refusing()) < 2.0
    assert {one.health for one in seen.all} == {"up", "down"}


def test_a_node_that_hangs_costs_the_first_look_a_quarter_of_a_second(
    seen: Seen, node: SimulatedNode
) -> None:
    with mute() as hung:
        assert 0.25 <= first_look(seen, hung, at(node)) < 2.0
    assert seen.health("a") == "up"


def test_without_any_healthy_node_the_first_look_ends_with_its_time(seen: Seen) -> None:
    with mute() as hung:
        assert 0.3 <= first_look(seen, hung, refusing(), limit=0.3) < 2.0


def test_no_nodes_need_no_look(seen: Seen) -> None:
    assert first_look(seen) < 2.0


def test_later_looks_cost_nothing(seen: Seen, node: SimulatedNode) -> None:
    with mute() as hung, collecting(seen, hung, at(node)) as collector:
        collector.wait_first(5.0)
        began = time.monotonic()
        collector.wait_first(5.0)

        assert time.monotonic() - began < 0.2


async def test_the_first_look_does_not_block_an_event_loop(seen: Seen, node: SimulatedNode) -> None:
    with mute() as hung, collecting(seen, hung, at(node)) as collector:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.01)

        turning = asyncio.ensure_future(turn())
        await collector.await_first(5.0)
        turning.cancel()
        await collector.await_first(0.0)

    assert seen.health("a") == "up"
    assert turns > 5


# ---------------------------------------------------------------------- refreshing


def test_a_refresh_looks_now_and_at_these_nodes_alone(seen: Seen, node: SimulatedNode) -> None:
    with SimulatedNode("b") as other, collecting(seen, at(node), at(other)) as collector:
        collector.wait_first(5.0)
        seen.wait(lambda: len(seen.all) >= 3)  # one of them with what show tells
        before = len(seen.of("b"))
        node.preload(LLAMA)

        assert collector.refresh_and_wait(["a", "unheard of"], timeout_seconds=5.0)

        assert list(seen.of("a")[-1].loaded or ()) == [LLAMA]
        collector.refresh(["a"])
        collector.refresh()
        seen.wait(lambda: len(seen.of("b")) > before)


def test_waiting_for_a_refresh_ends_with_its_time(seen: Seen) -> None:
    with mute() as hung, collecting(seen, hung, timeout_seconds=60.0) as collector:
        assert collector.refresh_and_wait(timeout_seconds=0.05) is False


async def test_refreshes_from_event_loops(seen: Seen, node: SimulatedNode) -> None:
    with mute() as hung, collecting(seen, at(node), hung, timeout_seconds=60.0) as collector:
        assert await collector.arefresh_and_wait(["a"], timeout_seconds=5.0)
        assert await collector.arefresh_and_wait([], timeout_seconds=5.0)
        assert not await collector.arefresh_and_wait(timeout_seconds=0.05)
        collector.refresh(["a"])


def test_its_own_thread_does_not_wait_for_itself(node: SimulatedNode) -> None:
    answers: list[bool] = []

    def ask(seen: Observation) -> None:
        if not answers:
            answers.append(collector.refresh_and_wait(timeout_seconds=60.0))
            collector.wait_first(60.0)

    with collecting(ask, at(node)) as collector:
        began = time.monotonic()
        collector.wait_first(5.0)
        assert time.monotonic() - began < 3.0
    assert answers == [False]


# ----------------------------------------------------------------------- callbacks


def test_a_callback_that_fails_does_not_end_the_probing(
    seen: Seen, node: SimulatedNode, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(one: Observation) -> None:
        seen(one)
        raise RuntimeError("no")

    with collecting(fail, at(node), interval_seconds=0.05) as collector:
        collector.wait_first(5.0)
        seen.wait(lambda: len(seen.all) >= 4)
    assert "what was seen of node a could not be taken in" in caplog.text


def test_ticks_come_on_its_thread_and_may_fail(
    seen: Seen,
    node: SimulatedNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(thread_module, "TICK_SECONDS", 0.01)
    ticked, names = threading.Event(), []

    def tick() -> None:
        names.append(threading.current_thread().name)
        if len(names) == 3:
            ticked.set()
        raise RuntimeError("no")

    with collecting(seen, at(node)) as collector:
        collector.add_tick(tick)
        collector.start()
        assert ticked.wait(5.0)
    assert set(names) == {"hydra-llm-collector"}
    assert "a tick failed" in caplog.text


def test_the_jitter_comes_from_the_random_source_it_was_given(
    seen: Seen, node: SimulatedNode
) -> None:
    rng = random.Random(7)
    with collecting(
        seen, at(node), rng=rng, interval_seconds=0.1, timeout_seconds=0.3
    ) as collector:
        collector.start()
        seen.wait(lambda: len(seen.all) >= 3)
    assert rng.random() != random.Random(7).random()


# ------------------------------------------------------------------------- errands


def test_errands_run_side_by_side_in_daemon_threads() -> None:
    together = threading.Barrier(50)
    with Errands() as errands:
        done = [
            errands.submit(lambda: (together.wait(10.0), threading.current_thread().daemon)[1])
            for _ in range(50)
        ]
        assert all(one.result(10.0) for one in done)


def test_an_errand_that_fails_tells_who_asked() -> None:
    with Errands() as errands, pytest.raises(ZeroDivisionError):
        errands.submit(lambda: 1 / 0).result(10.0)
