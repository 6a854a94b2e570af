"""A node that fails costs the caller nothing but a moment: what tests/faults leaves to say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import ollama
import pytest

from hydra_llm import (
    AllNodesFailedError,
    AsyncClient,
    Client,
    NoEligibleNodeError,
    Router,
    StreamBrokenError,
)
from hydra_llm.testing import (
    Behaviour,
    HangFault,
    RequestRecord,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    StatusFault,
    TokenFault,
)
from tests.router.conftest import MODEL, make_nodes, make_router

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]


async def until(condition: Callable[[], object]) -> None:
    """Wait until something outside this loop has happened; pytest-timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.001)


def chats(node: SimulatedNode) -> list[RequestRecord]:
    return [record for record in node.requests if record.path == "/api/chat"]


def test_a_required_pin_does_not_move_when_its_node_dies(
    cluster: SimulatedCluster, router: Router
) -> None:
    cluster["a"].inject(TokenFault(after=3))

    with Client(router=router, pin="require") as client:
        with pytest.raises(AllNodesFailedError) as caught:
            client.chat(MODEL, MESSAGES, node_id="a")

    assert [a.node_id for a in caught.value.attempts] == ["a"]
    assert "\n" not in str(caught.value)


def test_the_callers_own_mistake_comes_straight_back_and_blames_nobody(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router) as client, pytest.raises(ollama.ResponseError) as caught:
        client.chat(MODEL, MESSAGES, keep_alive="5 apples")

    assert caught.value.status_code == 400
    assert "time: unknown unit" in caught.value.error
    assert sum(len(chats(node)) for node in cluster) == 1
    assert all(n.circuit == "closed" and not n.penalty_seconds for n in router.nodes())


def test_when_all_nodes_fail_the_error_holds_every_attempt(
    cluster: SimulatedCluster, router: Router
) -> None:
    for node in cluster:
        node.inject(StatusFault(status=500))

    with Client(router=router) as client, pytest.raises(AllNodesFailedError) as caught:
        client.chat(MODEL, MESSAGES)

    assert sorted(a.node_id for a in caught.value.attempts) == ["a", "b", "c"]
    assert isinstance(caught.value, ConnectionError)
    assert "lighthouses" not in str(caught.value)
    assert router.in_flight == 0


def test_nobody_up_is_an_error_that_counts(cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.kill()
    with make_router(cluster) as router, Client(router=router) as client:
        with pytest.raises(NoEligibleNodeError, match=r"0/3 nodes can take .*: 3 down"):
            client.chat(MODEL, MESSAGES)


def test_a_node_without_the_model_gets_no_request_for_it() -> None:
    a, b = make_nodes("a", models=("llama3.2:3b",)), make_nodes("b", models=("qwen3:8b",))
    with (
        SimulatedCluster([*a, *b]) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
    ):
        for _ in range(10):
            assert client.chat("llama3.2:3b", MESSAGES).node_id == "a"
            assert client.chat("qwen3:8b", MESSAGES).node_id == "b"

        assert all(r.status == 200 for n in cluster for r in n.requests)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_model_that_loops_is_an_error_but_not_the_nodes_fault(stream: bool) -> None:
    model = SimulatedModel("loop", behaviour=Behaviour(kind="loop", tokens=(" again",)))
    with (
        SimulatedCluster(make_nodes("a", models=(model,))) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
    ):
        for _ in range(5):
            with pytest.raises((StreamBrokenError, AllNodesFailedError), match="complete"):
                list(client.chat("loop", MESSAGES, stream=stream))
        (node,) = router.nodes()

    assert (node.circuit, node.penalty_seconds) == ("closed", 0.0)


async def test_a_cancelled_call_closes_the_upstream_request_and_frees_its_place(
    cluster: SimulatedCluster, router: Router
) -> None:
    async with AsyncClient(router=router, node_id="a") as client:
        cluster["a"].inject(HangFault())
        task = asyncio.create_task(client.chat(MODEL, MESSAGES))
        await until(lambda: chats(cluster["a"]))
        assert router.in_flight == 1

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert router.in_flight == 0
        left_at = time.monotonic()
        await until(lambda: chats(cluster["a"])[0].finished is not None)
        assert chats(cluster["a"])[0].outcome == "client left"
        assert (chats(cluster["a"])[0].finished or 0.0) - left_at < 0.1


def test_an_abandoned_stream_frees_its_place_at_once(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router, node_id="a") as client:
        stream = client.chat(MODEL, MESSAGES, stream=True, options={"num_predict": 100_000})
        next(stream)
        assert router.in_flight == 1
        stream.close()
        assert router.in_flight == 0
