"""Real processes, a real Redis, simulated nodes on real sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import AsyncClient, Client, Node, Router
from hydra_llm.cluster import sharing
from hydra_llm.events import Event, SharingLost, SharingRestored
from hydra_llm.testing import SimulatedCluster
from tests.helpers import most_at_once
from tests.router.conftest import MODEL, make_nodes, make_router
from tests.sharing.servers import RedisServer
from tests.sharing.worker import ENDLESS, MESSAGES, REQUESTS, SHORT

ROOT = Path(__file__).parents[2]

SLOTS = 2
HEADROOM = 1
"""Of a request of priority 5."""


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """Two nodes of two slots that take 50 ms for a short answer and never end an endless one."""
    about: dict[str, Any] = {"num_parallel": SLOTS, "speed": 1.0, "token_output": 10_000}
    with SimulatedCluster(make_nodes("a", "b", **about)) as cluster:
        for node in cluster:
            node.preload(MODEL)
        yield cluster


def told(cluster: SimulatedCluster, *ids: str) -> list[Node]:
    return [cluster[each].node(slots=SLOTS) for each in ids]


@contextmanager
def worker(nodes: list[Node], url: str, role: str) -> Iterator[subprocess.Popen[str]]:
    about = [{"url": node.url, "id": node.id, "slots": node.slots} for node in nodes]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sharing.worker", json.dumps(about), url, role],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until(condition: Callable[[], object], seconds: float = 5.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        time.sleep(0.005)
    return time.monotonic() - began


def test_two_workers_never_hand_a_runner_more_than_its_slots_and_headroom(
    cluster: SimulatedCluster, server: RedisServer
) -> None:
    nodes = told(cluster, "a", "b")
    with worker(nodes, server.url, "threads") as one, worker(nodes, server.url, "loop") as other:
        assert [line(one), line(other)] == ["ready", "ready"]
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [line(one), line(other)] == ["done", "done"]

    chats = [r for node in cluster for r in node.requests if r.path == "/api/chat"]
    assert len(chats) == 2 * REQUESTS
    # More were wanted, all the time.
    assert SLOTS <= max(most_at_once(node) for node in cluster) <= SLOTS + HEADROOM


def test_a_killed_worker_frees_its_places_once_its_leases_have_expired(
    cluster: SimulatedCluster, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "LEASE_SECONDS", 1.0)
    nodes = told(cluster, "a")
    with worker(nodes, server.url, "hold") as process:
        assert line(process) == "holding"
        with make_router(cluster, nodes=nodes, redis_url=server.url) as router:
            until(lambda: len(router.nodes()[0].running) == SLOTS + HEADROOM)
            answers: list[Any] = []
            with Client(router=router) as client:
                asking = threading.Thread(
                    target=lambda: answers.append(client.chat(MODEL, MESSAGES, options=SHORT))
                )
                asking.start()
                until(lambda: router.waiting)
                killed_at = time.monotonic()
                process.send_signal(signal.SIGKILL)
                asking.join()

    assert answers
    # Not at once, for nobody can know; and no later than they were good for.
    assert 0.3 < time.monotonic() - killed_at < 3.0


def test_a_forked_child_is_a_router_of_its_own(
    cluster: SimulatedCluster, server: RedisServer
) -> None:
    with worker(told(cluster, "a"), server.url, "fork") as process:
        assert line(process) == "done"


# ------------------------------------------------------------------------ the doors


@pytest.fixture
def pair(cluster: SimulatedCluster, server: RedisServer) -> Iterator[tuple[Router, Router]]:
    """Two routers over node a; in one process, and strangers all the same."""
    nodes = told(cluster, "a")
    about: dict[str, Any] = {"nodes": nodes, "redis_url": server.url}
    with make_router(cluster, **about) as one, make_router(cluster, **about) as other:
        one.nodes()
        other.nodes()
        yield one, other
        for router in (one, other):
            assert (router.in_flight, router.waiting) == (0, 0)


def claims_of(router: Router, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    assert router._sharing is not None
    made: list[Any] = []
    claim = router._sharing.claim

    def counted(*about: Any) -> Any:
        made.append(about)
        return claim(*about)

    monkeypatch.setattr(router._sharing, "claim", counted)
    return made


def test_a_request_is_claimed_once(
    pair: tuple[Router, Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = claims_of(pair[0], monkeypatch)

    with Client(router=pair[0]) as client:
        pair[0].explain(MODEL)
        assert claims == []
        client.chat(MODEL, MESSAGES, options=SHORT)
    assert len(claims) == 1


async def test_who_finds_no_room_waits_and_is_served(pair: tuple[Router, Router]) -> None:
    one, other = pair

    async def listen(client: AsyncClient) -> None:
        async for _ in await client.chat(MODEL, MESSAGES, options=ENDLESS, stream=True):
            pass

    async with AsyncClient(router=one) as holder, AsyncClient(router=other) as asker:
        held = [asyncio.create_task(listen(holder)) for _ in range(SLOTS + HEADROOM)]
        while sum(lease.shared_by is not None for lease in one._cluster.held()) < len(held):
            await asyncio.sleep(0)
        # As soon as that, only Redis and its router know of them.
        asked = asyncio.create_task(asker.chat(MODEL, MESSAGES, options=SHORT))
        await asyncio.sleep(0.2)
        assert (other.in_flight, other.waiting) == (0, 1)

        held[-1].cancel()
        held[0].cancel()
        answer = await asked
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    assert answer["node_id"] == "a"


async def test_a_request_cancelled_in_any_state_leaves_nothing(
    pair: tuple[Router, Router], server: RedisServer
) -> None:
    one, other = pair
    async with AsyncClient(router=one) as client, AsyncClient(router=other) as rival:
        for n in range(40):
            asked = [
                asyncio.create_task(who.chat(MODEL, MESSAGES, options=SHORT))
                for who in (client, rival, client, rival, client)
            ]
            await asyncio.sleep(n * 0.0002)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
    for router in pair:
        assert (router.in_flight, router.waiting) == (0, 0)
    await asyncio.to_thread(
        until, lambda: not any(len(router.nodes()[0].running) for router in pair)
    )


# -------------------------------------------------------------------- Redis is away


def test_a_killed_redis_costs_no_request_and_is_joined_again(
    cluster: SimulatedCluster, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "RETRY_SECONDS", 0.1)
    events: list[Event] = []
    nodes = told(cluster, "a")
    with (
        make_router(cluster, nodes=nodes, redis_url=server.url, on_event=events.append) as router,
        Client(router=router) as client,
    ):
        client.chat(MODEL, MESSAGES, options=SHORT)
        server.kill()
        for _ in range(5):
            client.chat(MODEL, MESSAGES, options=SHORT)
        until(lambda: router._sharing and router._sharing.state == "alone")
        server.start()
        until(lambda: router._sharing and router._sharing.state == "together")
        client.chat(MODEL, MESSAGES, options=SHORT)

    shared = [type(e) for e in events if isinstance(e, SharingLost | SharingRestored)]
    assert shared == [SharingLost, SharingRestored]


def test_a_redis_that_hangs_delays_requests_once_and_not_for_long(
    cluster: SimulatedCluster, server: RedisServer
) -> None:
    nodes = told(cluster, "a")
    with make_router(cluster, nodes=nodes, redis_url=server.url) as router:
        with Client(router=router) as client:
            client.chat(MODEL, MESSAGES, options=SHORT)
            server.freeze()
            began = time.monotonic()
            client.chat(MODEL, MESSAGES, options=SHORT)
            first = time.monotonic() - began
            slowest = 0.0
            for _ in range(5):
                began = time.monotonic()
                client.chat(MODEL, MESSAGES, options=SHORT)
                slowest = max(slowest, time.monotonic() - began)
            server.thaw()

    assert first < 1.0
    assert slowest < 0.25  # 50 ms of answer, and not a wait for Redis


def test_a_redis_that_was_never_there_costs_nothing_but_a_word(
    cluster: SimulatedCluster, server: RedisServer
) -> None:
    server.kill()
    events: list[Event] = []
    with (
        make_router(
            cluster, nodes=told(cluster, "a"), redis_url=server.url, on_event=events.append
        ) as router,
        Client(router=router) as client,
    ):
        assert client.chat(MODEL, MESSAGES, options=SHORT)["node_id"] == "a"

    assert sum(isinstance(event, SharingLost) for event in events) == 1


def test_without_the_setting_no_thread_is_there(cluster: SimulatedCluster) -> None:
    with make_router(cluster) as router:
        router.nodes()
        assert router._sharing is None
        assert not any(t.name == "hydra-llm-sharing" for t in threading.enumerate())
