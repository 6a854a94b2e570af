"""Two routers of one process over the same nodes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest

from hydra_llm import AsyncClient, Client
from hydra_llm.scheduling.scheduler import HEADROOM_BY_PRIORITY
from hydra_llm.testing import SimulatedCluster
from tests.helpers import most_at_once
from tests.router.conftest import MODEL, make_nodes, make_router, preloaded

SLOTS = 2
REQUESTS = 500
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("priority", [1, 5, 10])
async def test_500_at_once_are_never_more_on_a_runner_than_its_slots_and_headroom(
    priority: int,
) -> None:
    rng = random.Random(priority)
    made = make_nodes("a", "b", num_parallel=SLOTS, speed=20.0, token_output=8)
    with preloaded(made, MODEL) as cluster:
        nodes = [node.node(slots=SLOTS) for node in cluster]
        async with (
            make_router(cluster, nodes=nodes) as one,
            make_router(cluster, nodes=nodes) as other,
            AsyncClient(router=one, priority=priority) as first,
            AsyncClient(router=other, priority=priority) as second,
        ):

            async def ask(client: AsyncClient, leaves: bool) -> str:
                if leaves:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(client.chat(MODEL, MESSAGES), rng.random() / 10)
                    return "left"
                return (await client.chat(MODEL, MESSAGES)).node_id or ""

            ends = Counter(
                await asyncio.gather(
                    *(
                        ask(first if number % 2 else second, leaves=number % 10 == 0)
                        for number in range(REQUESTS)
                    )
                )
            )

            assert one.in_flight == other.in_flight == one.waiting == other.waiting == 0
            while any(node.in_flight for node in cluster):
                await asyncio.sleep(0.01)
    room = SLOTS + HEADROOM_BY_PRIORITY[priority - 1]
    assert all(SLOTS <= most_at_once(node) <= room for node in cluster)
    assert ends["a"] + ends["b"] == REQUESTS * 9 // 10
    assert min(ends["a"], ends["b"]) > REQUESTS / 5


def test_each_shows_what_the_other_has_in_flight(cluster: SimulatedCluster) -> None:
    with make_router(cluster) as one, make_router(cluster) as other, Client(router=one) as client:
        other.nodes()
        parts = client.chat(MODEL, MESSAGES, stream=True, node_id="a")
        next(parts)

        shown = {node.id: len(node.running) for node in other.nodes()}
        assert shown == {"a": 1, "b": 0, "c": 0}
        assert (one.in_flight, other.in_flight) == (1, 0)
        parts.close()
        assert not any(node.running for node in other.nodes())
