"""A node that fails costs the caller nothing but a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

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
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HtmlFault,
    HugeFault,
    MissingModelFault,
    RequestRecord,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    StatusFault,
    TokenFault,
)
from tests.router.conftest import MODEL, make_nodes, make_router

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]

BEFORE_THE_FIRST_BYTE: list[tuple[str, Fault, str]] = [
    ("status 500", StatusFault(status=500), "error_response"),
    ("status 503", StatusFault(status=503), "busy"),
    ("status 429", StatusFault(status=429, retry_after=7.0), "busy"),
    ("status 401", StatusFault(status=401), "auth"),
    ("status 403", StatusFault(status=403), "auth"),
    ("model missing", MissingModelFault(), "model_not_found"),
    ("error body", ErrorBodyFault(), "error_response"),
    ("error line first", ErrorLineFault(after=0), "error_response"),
    ("reset at once", ResetFault(), "reset"),
    ("html", HtmlFault(), "protocol"),
    ("huge", HugeFault(size_bytes=2_000_000), "protocol"),
]
FAULTS = pytest.mark.parametrize(
    ("fault", "cause"),
    [(fault, cause) for _, fault, cause in BEFORE_THE_FIRST_BYTE],
    ids=[name for name, _, _ in BEFORE_THE_FIRST_BYTE],
)


async def until(condition: Callable[[], object]) -> None:
    """Wait until something outside this loop has happened; pytest-timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.001)


def chats(node: SimulatedNode) -> list[RequestRecord]:
    return [record for record in node.requests if record.path == "/api/chat"]


def prefer_a(cluster: SimulatedCluster) -> dict[str, Any]:
    return {
        "nodes": [
            cluster["a"].node(labels=("first",)),
            cluster["b"].node(),
            cluster["c"].node(),
        ],
        "max_body_bytes": 1_000_000,
    }


@FAULTS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_fault_before_the_first_byte_is_hidden_from_a_sync_caller(
    cluster: SimulatedCluster, fault: Fault, cause: str, stream: bool
) -> None:
    cluster["a"].inject(fault)
    with (
        make_router(cluster, **prefer_a(cluster)) as router,
        Client(router=router, prefer_labels="first") as client,
    ):
        answer = client.chat(MODEL, MESSAGES, stream=stream)
        last = list(answer)[-1] if stream else answer
        decision = last.routing_decision

        assert [a.outcome for a in decision.attempts] == [cause, "ok"]
        assert decision.attempts[0].node_id == "a"
        assert last.node_id in ("b", "c")
        assert f"after a ({cause}) failed" in decision.reason
        assert router.in_flight == 0


@FAULTS
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_fault_before_the_first_byte_is_hidden_from_an_async_caller(
    cluster: SimulatedCluster, fault: Fault, cause: str, stream: bool
) -> None:
    cluster["a"].inject(fault)
    async with (
        make_router(cluster, **prefer_a(cluster)) as router,
        AsyncClient(router=router, prefer_labels="first") as client,
    ):
        answer = await client.chat(MODEL, MESSAGES, stream=stream)
        last = [part async for part in answer][-1] if stream else answer

        assert [a.outcome for a in last.routing_decision.attempts] == [cause, "ok"]
        assert last.node_id in ("b", "c")
        assert router.in_flight == 0


BROKEN: list[tuple[str, Fault]] = [
    ("error line", ErrorLineFault(after=5)),
    ("reset", ResetFault(after=5)),
    ("cut without done", CutFault(after=5)),
    ("killed", TokenFault(after=5)),
]
MID_STREAM = pytest.mark.parametrize("fault", [f for _, f in BROKEN], ids=[n for n, _ in BROKEN])


@MID_STREAM
def test_a_stream_that_breaks_is_a_typed_error_and_never_a_second_answer(
    cluster: SimulatedCluster, router: Router, fault: Fault
) -> None:
    cluster["a"].inject(fault)
    received = []

    with Client(router=router, node_id="a") as client:
        with pytest.raises(StreamBrokenError) as caught:
            for part in client.chat(MODEL, MESSAGES, stream=True):
                received.append(part.message.content)

    assert caught.value.node_id == "a"
    assert caught.value.node_url == cluster["a"].url
    assert len(received) == 5
    assert caught.value.parts == 5
    assert not chats(cluster["b"])
    assert not chats(cluster["c"])


@MID_STREAM
async def test_an_async_stream_that_breaks_is_a_typed_error_too(
    cluster: SimulatedCluster, router: Router, fault: Fault
) -> None:
    cluster["a"].inject(fault)
    received = []

    async with AsyncClient(router=router, node_id="a") as client:
        with pytest.raises(StreamBrokenError, match="the answer of a"):
            async for part in await client.chat(MODEL, MESSAGES, stream=True):
                received.append(part.message.content)

    assert len(received) == 5


def test_a_whole_answer_restarts_elsewhere_when_its_node_dies(
    cluster: SimulatedCluster, router: Router
) -> None:
    cluster["a"].inject(TokenFault(after=3))

    with Client(router=router) as client:
        answer = client.chat(MODEL, MESSAGES, node_id="a")

    assert [a.outcome for a in answer.routing_decision.attempts] == ["reset", "ok"]
    assert answer.node_id != "a"


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
