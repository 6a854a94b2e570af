"""
Rows that need no fault of one node, or no socket: plain functions, so that switches can run them.

Those that tests/cluster has already are run from there.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from hydra_llm import AllNodesFailedError, AsyncClient, Client, DeadlineError
from hydra_llm.events import CircuitClosed, CircuitOpened, Event
from hydra_llm.exceptions import NodeConnectError, NodeTimeoutError, NoEligibleNodeError
from hydra_llm.testing import HangFault, StatusFault
from tests.cluster.ledgers import Clock, failure, granted, ledger, seen, snapshot_of
from tests.faults.catalogue import MODEL
from tests.faults.stage import MESSAGES, stage_of, until
from tests.helpers import LLAMA, request

OPEN_SECONDS, LONGEST_SECONDS = 5.0, 40.0


def all_down_then_one_back() -> None:
    """While all are down each one's reason is told; the first probe that succeeds ends it."""
    cluster = ledger(*(seen(id_, warm=(LLAMA,)) for id_ in "abc"))
    for _ in "abc":
        lease = granted(cluster, request())
        cluster.failed(lease, failure(NodeConnectError, lease.node_id))
    with pytest.raises(NoEligibleNodeError, match="3 down") as caught:
        cluster.acquire(request())
    assert [one.node_id for one in caught.value.rejections] == ["a", "b", "c"]

    cluster.observe(seen("b", at=1.0, warm=(LLAMA,)))

    assert granted(cluster, request()).node_id == "b"


def a_node_that_never_gets_well() -> None:
    """For an hour it is tried ever more seldom, by one request each, and not to the second."""
    clock, events = Clock(), list[Event]()
    cluster = ledger(
        *(seen(id_, warm=(LLAMA,)) for id_ in "ab"),
        clock=clock,
        on_event=events.append,
        breaker_open_seconds=OPEN_SECONDS,
        breaker_max_open_seconds=LONGEST_SECONDS,
    )
    tried: list[float] = []
    while clock.now < 3600.0:
        clock.now += 0.5
        node = snapshot_of(cluster)
        if node.circuit_retry_at is None or clock.now >= node.circuit_retry_at:
            cluster.failed(granted(cluster, request(node_id="a")), failure(NodeTimeoutError))
            tried.append(clock.now)

    waits = [later - earlier for earlier, later in pairwise(tried)][2:]
    assert waits[0] <= 1.2 * OPEN_SECONDS + 0.5
    assert all(wait <= 1.2 * LONGEST_SECONDS + 0.5 for wait in waits)
    grown = waits[4:]
    assert min(grown) >= 0.8 * LONGEST_SECONDS
    assert len(set(grown)) > 10, "without jitter several routers return at once"
    assert len(tried) < 3600 / (0.8 * LONGEST_SECONDS) + 10
    assert not any(isinstance(event, CircuitClosed) for event in events)
    assert sum(isinstance(event, CircuitOpened) for event in events) == len(tried) - 2


def nothing_but_errors() -> None:
    """However many requests come, further attempts are a fifth of them and a floor."""
    requests, floor, ratio = 40, 3, 0.2
    with stage_of(4, retry_floor=floor, retry_ratio=ratio, breaker_failures=1000) as stage:
        for node in stage.cluster:
            node.inject(StatusFault(500))
        with Client(router=stage.router) as client:
            for _ in range(requests):
                with pytest.raises(AllNodesFailedError):
                    client.chat(MODEL, MESSAGES)
        attempts = sum(len(stage.asked_of(node)) for node in stage.cluster)

    assert requests < attempts <= (1 + ratio) * requests + floor


def a_deadline_that_nobody_can_make() -> None:
    """It is told at once, with what was expected, and nothing is sent."""
    with stage_of(2) as stage:
        with Client(router=stage.router) as client:
            with pytest.raises(DeadlineError, match="expected"):
                client.chat(MODEL, MESSAGES, deadline_s=0.001)
        assert not any(stage.asked_of(node) for node in stage.cluster)


def a_call_that_is_cancelled() -> None:
    """The node is let go of, and nobody is blamed."""

    async def ask_and_leave(client: AsyncClient) -> None:
        call = asyncio.create_task(client.chat(MODEL, MESSAGES))
        while not stage.asked_of(stage.first):
            await asyncio.sleep(0.002)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # While the loop goes on: at its end it would close everything by itself.
        await asyncio.to_thread(until, lambda: not stage.first.in_flight, "it goes on for nobody")
        assert stage.router.in_flight == 0

    with stage_of(1) as stage:
        stage.first.inject(HangFault())
        asyncio.run(ask_and_leave(AsyncClient(router=stage.router)))
        assert stage.asked_of(stage.first)[0].outcome == "client left"
        assert stage.failures == []
        assert stage.seen().penalty_seconds == 0.0


def a_stream_that_is_left() -> None:
    """The same for who has read enough."""
    with stage_of(1, of_the_first={"token_output": 10_000, "speed": 20.0}) as stage:
        with Client(router=stage.router) as client:
            stream = client.chat(MODEL, MESSAGES, stream=True)
            next(stream)
            stream.close()
            until(lambda: not stage.first.in_flight, "it goes on for nobody")
            assert stage.router.in_flight == 0
        assert stage.failures == []


def a_cordon() -> None:
    """New requests go elsewhere, those under way go on, and a pin says why."""
    cluster = ledger(*(seen(id_, warm=(LLAMA,)) for id_ in "ab"))
    under_way = granted(cluster, request(node_id="a"))

    cluster.set_cordoned("a", True)

    assert {granted(cluster, request()).node_id for _ in range(2)} == {"b"}
    with pytest.raises(NoEligibleNodeError) as caught:
        cluster.acquire(request(node_id="a", strict_pin=True))
    assert {one.node_id: one.reason for one in caught.value.rejections}["a"] == "cordoned"
    assert under_way.is_held
    cluster.succeeded(under_way, None)
    cluster.set_cordoned("a", False)
    assert granted(cluster, request(node_id="a", strict_pin=True)).node_id == "a"


def a_late_probe() -> None:
    """What a probe saw before a request found the node down is old news."""
    clock = Clock()
    cluster = ledger(*(seen(id_, warm=(LLAMA,)) for id_ in "ab"), clock=clock)
    clock.now = 10.0
    cluster.failed(granted(cluster, request(node_id="a")), failure(NodeConnectError))

    cluster.observe(seen("a", at=9.0, warm=(LLAMA,)))
    assert snapshot_of(cluster).health == "down"
    cluster.observe(seen("a", at=11.0, warm=(LLAMA,)))
    assert snapshot_of(cluster).health == "up"


ROWS = {
    row.__name__.replace("_", " "): row
    for row in (
        all_down_then_one_back,
        a_node_that_never_gets_well,
        nothing_but_errors,
        a_deadline_that_nobody_can_make,
        a_call_that_is_cancelled,
        a_stream_that_is_left,
        a_cordon,
        a_late_probe,
    )
}
