"""An answer that broke off, asked for once more: `restart_of=` the error."""

from __future__ import annotations

import pickle
from typing import Any

import httpx
import pytest

from hydra_llm import (
    AllNodesFailedError,
    AsyncClient,
    Client,
    ConfigurationError,
    DeadlineError,
    HydraTransport,
    Router,
    StreamBrokenError,
)
from hydra_llm.testing import CutFault, SimulatedCluster, StatusFault
from tests.router.conftest import MODEL, make_router

HELLO = [{"role": "user", "content": "Tell me about lighthouses."}]


def asked(cluster: SimulatedCluster) -> list[str]:
    return [n.id for n in cluster for r in n.requests if r.path == "/api/chat"]


def broken_by(client: Client, **words: Any) -> StreamBrokenError:
    with pytest.raises(StreamBrokenError) as caught:
        list(client.chat(MODEL, HELLO, stream=True, **words))
    return caught.value


def heal(cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.clear_faults()


@pytest.fixture
def cut(cluster: SimulatedCluster) -> SimulatedCluster:
    for node in cluster:
        node.inject(CutFault(after=3), times=1)
    return cluster


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_it_goes_to_another_node_and_its_decision_tells_of_both(
    cluster: SimulatedCluster, router: Router, stream: bool
) -> None:
    cluster["b"].inject(CutFault(after=3), times=1)
    client = Client(router=router)
    broken = broken_by(client, node_id="b")

    answer = client.chat(MODEL, HELLO, stream=stream, restart_of=broken)
    last = list(answer)[-1] if stream else answer

    decision = last.routing_decision
    assert [(a.node_id, a.outcome) for a in decision.attempts] == [
        ("b", "stream_broken"),
        (decision.selected_node, "ok"),
    ]
    assert decision.selected_node != "b"
    assert "after b (stream_broken) failed" in decision.reason
    assert decision.actual is not None
    assert decision.actual["total"] >= decision.attempts[0].seconds


async def test_it_does_so_in_an_event_loop(cluster: SimulatedCluster) -> None:
    cluster["b"].inject(CutFault(after=3), times=1)
    async with make_router(cluster) as router:
        client = AsyncClient(router=router)
        with pytest.raises(StreamBrokenError) as caught:
            async for _ in await client.chat(MODEL, HELLO, stream=True, node_id="b"):
                pass
        answer = await client.chat(MODEL, HELLO, restart_of=caught.value)
    assert answer.routing_decision.attempts[0].node_id == "b"


def test_it_never_goes_to_a_node_twice(cut: SimulatedCluster, router: Router) -> None:
    client = Client(router=router)
    broken = broken_by(client)
    for _ in range(2):
        broken = broken_by(client, restart_of=broken)
    assert sorted(a.node_id for a in broken.attempts) == ["a", "b", "c"]

    with pytest.raises(AllNodesFailedError, match=r"^3 nodes tried") as caught:
        client.chat(MODEL, HELLO, restart_of=broken)

    assert sorted(asked(cut)) == ["a", "b", "c"]
    assert [a.node_id for a in caught.value.attempts] == [a.node_id for a in broken.attempts]
    assert isinstance(caught.value.__cause__, StreamBrokenError)


def test_a_node_that_failed_before_stays_left_out(
    cluster: SimulatedCluster, router: Router
) -> None:
    cluster["a"].inject(StatusFault(500))
    for node in (cluster["b"], cluster["c"]):
        node.inject(CutFault(after=3), times=1)
    broken = broken_by(Client(router=router), node_id="a")  # to b or c, in the end
    for node in (cluster["b"], cluster["c"]):
        node.clear_faults()

    answer = Client(router=router).chat(MODEL, HELLO, restart_of=broken)
    assert len({a.node_id for a in answer.routing_decision.attempts}) == 3
    assert asked(cluster).count("a") == 1


def test_the_deadline_counts_from_the_first_try(cut: SimulatedCluster) -> None:
    now = [100.0]
    with Router(cut.nodes(), clock=lambda: now[0]) as router:
        client = Client(router=router)
        broken = broken_by(client, deadline_s=60)
        now[0] += 61
        with pytest.raises(DeadlineError, match="60 s have passed"):
            client.chat(MODEL, HELLO, deadline_s=60, restart_of=broken)


def test_it_is_paid_for_from_the_retry_budget(cut: SimulatedCluster) -> None:
    with make_router(cut, retry_floor=0, retry_ratio=0.0) as router:
        client = Client(router=router)
        broken = broken_by(client)
        with pytest.raises(AllNodesFailedError, match="the retry budget is spent"):
            client.chat(MODEL, HELLO, restart_of=broken)


def test_a_transport_takes_it_as_an_extension(cut: SimulatedCluster, router: Router) -> None:
    broken = broken_by(Client(router=router))
    heal(cut)
    with httpx.Client(transport=HydraTransport(router=router), base_url="http://hydra") as web:
        answer = web.post(
            "/api/chat",
            json={"model": MODEL, "messages": HELLO, "stream": False},
            extensions={"hydra_restart_of": broken},
        )
    assert answer.status_code == 200
    assert answer.headers["x-hydra-node-id"] != broken.node_id


def test_anything_else_is_an_error(router: Router) -> None:
    with pytest.raises(ConfigurationError, match="restart_of should be a StreamBrokenError"):
        Client(router=router).chat(MODEL, HELLO, restart_of=ValueError("no"))
    Client(router=router).chat(MODEL, HELLO, restart_of=None)


def test_the_error_survives_a_process_pool(cut: SimulatedCluster, router: Router) -> None:
    broken = broken_by(Client(router=router))
    heal(cut)
    sent = pickle.loads(pickle.dumps(broken))  # noqa: S301  our own

    assert (sent.attempts, sent.parts, str(sent)) == (broken.attempts, broken.parts, str(broken))
    answer = Client(router=router).chat(MODEL, HELLO, restart_of=sent)
    assert answer.node_id != broken.node_id
