"""Two of LiteLLM's proxies that share one Redis, over one simulated node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from hydra_llm.testing import SimulatedCluster, SimulatedNode, StallFault
from tests.helpers import most_at_once
from tests.litellm.conftest import HELLO, auntil
from tests.litellm.proxies import ENVIRONMENT, books, deployment, needs_proxy, running, write_config
from tests.router.conftest import MODEL, make_nodes, preloaded
from tests.sharing.servers import RedisServer, needs_redis

SLOTS = 2
ROOM = SLOTS + 1
"""With the headroom of a request of priority 5."""
LEASE_SECONDS = 4.0
REQUESTS = 14
AT_ONCE = 8

pytestmark = [needs_proxy, needs_redis, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    """One node, which takes some 0.4 s for an answer."""
    with preloaded(make_nodes("a", num_parallel=SLOTS, speed=1.0), MODEL) as cluster:
        yield cluster


@pytest.fixture
def node(cluster: SimulatedCluster) -> SimulatedNode:
    return cluster["a"]


@pytest.fixture(scope="module")
def workers(
    cluster: SimulatedCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[running]]:
    """Two proxies: one with `--num_workers 2` is a third process that imports LiteLLM too."""
    folder = tmp_path_factory.mktemp("workers")
    server = RedisServer(folder)
    lines = [deployment("chat", f"ollama_chat/{MODEL}", one, slots=SLOTS) for one in cluster]
    config = write_config(folder, lines)
    command = ["-m", "litellm.proxy.proxy_cli", "--config", str(config)]
    about = {
        **ENVIRONMENT,
        "HYDRA_LLM_REDIS_URL": server.url,
        "LEASE_SECONDS": f"{LEASE_SECONDS}",
    }
    with ExitStack() as stack:
        server.start()
        stack.callback(server.kill)
        both = []
        for name in ("one", "other"):
            log = folder / name
            log.mkdir()
            both.append(running(command, log, about, cwd=folder))
            stack.callback(both[-1].kill)
        for worker in both:
            stack.enter_context(worker)
        yield both


async def ask(client: httpx.AsyncClient, *, stream: bool) -> int:
    """One chat, read to its end; the status of the answer."""
    body: dict[str, Any] = {"model": "chat", "messages": HELLO, "stream": stream}
    answer = await client.post("/v1/chat/completions", json=body)
    assert "error" not in answer.json() if not stream else "[DONE]" in answer.text
    return answer.status_code


def client_of(worker: running) -> httpx.AsyncClient:
    headers = {"Authorization": "Bearer sk-x"}
    return httpx.AsyncClient(base_url=worker.url, headers=headers, timeout=120)


async def test_two_workers_never_hand_a_runner_more_than_its_slots_and_headroom(
    workers: Sequence[running], node: SimulatedNode
) -> None:
    async def work(worker: running) -> list[int]:
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> int:
            async with turns:
                return await ask(client, stream=number % 2 == 0)

        async with client_of(worker) as client:
            return await asyncio.gather(*(one(number) for number in range(REQUESTS)))

    one, other = await asyncio.gather(*(work(worker) for worker in workers))

    assert one == other == [200] * REQUESTS
    # More were wanted, all the time.
    assert most_at_once(node) == ROOM
    for worker in workers:
        told = books(worker.url)
        assert told["opened"] >= REQUESTS
        assert (told["released"], told["in_flight"]) == (told["opened"], 0)


async def test_a_killed_worker_frees_its_places_once_its_leases_have_expired(
    workers: Sequence[running], node: SimulatedNode
) -> None:
    doomed, other = workers
    node.inject(StallFault(after=1), times=2 * ROOM)
    async with client_of(doomed) as early, client_of(other) as late:
        held = [asyncio.create_task(ask(early, stream=True)) for _ in range(ROOM)]
        await auntil(lambda: node.in_flight == ROOM, 20.0)
        asked = [asyncio.create_task(ask(late, stream=True)) for _ in range(ROOM)]
        await auntil(lambda: books(other.url)["waiting"] == ROOM, 20.0)

        doomed.process.kill()
        killed_at = time.monotonic()
        await auntil(lambda: node.in_flight == 0)
        # Nobody can know at once.
        assert books(other.url)["waiting"] == ROOM
        await auntil(lambda: node.in_flight == ROOM, LEASE_SECONDS + 10.0)
        assert time.monotonic() - killed_at > LEASE_SECONDS / 2

        for task in (*held, *asked):
            task.cancel()
        await asyncio.gather(*held, *asked, return_exceptions=True)
    await auntil(lambda: not books(other.url)["in_flight"] and not node.in_flight, 20.0)
    told = books(other.url)
    assert (told["released"], told["waiting"]) == (told["opened"], 0)
