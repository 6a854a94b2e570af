"""What was foreseen and what happened, of real requests through every door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from hydra_llm import (
    AsyncClient,
    Client,
    HydraTransport,
    Router,
    RoutingDecision,
    StreamBrokenError,
)
from hydra_llm.dispatch import Dispatch
from hydra_llm.ollama.calls import read_call
from hydra_llm.scheduling import TERMS
from hydra_llm.testing import Behaviour, SimulatedCluster, SimulatedModel, StatusFault, TokenFault
from hydra_llm.words import RoutingWords
from tests.router.conftest import MODEL, make_nodes, make_router, preloaded

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]
EMBEDS = "nomic-embed-text"
NO_FIRST = set(TERMS) - {"first_token"}


@pytest.fixture
def told() -> list[RoutingDecision]:
    """Every finished request's decision."""
    return []


@pytest.fixture
def one(told: list[RoutingDecision]) -> Iterator[tuple[SimulatedCluster, Router]]:
    with (
        preloaded(make_nodes("a"), MODEL) as cluster,
        make_router(cluster, on_decision=told.append) as router,
    ):
        yield cluster, router


One = tuple[SimulatedCluster, Router]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_an_answer_has_one(one: One, verb: str, streamed: bool) -> None:
    with Client(router=one[1]) as client:
        asked: Any = {"messages": MESSAGES} if verb == "chat" else {"prompt": "Lighthouses?"}
        answer = getattr(client, verb)(MODEL, **asked, stream=streamed)
        decision = (list(answer)[-1] if streamed else answer).routing_decision

    outcome = decision.outcome
    assert outcome.node_id == "a"
    assert set(outcome.predicted) == set(TERMS)
    assert set(outcome.actual) == (set(TERMS) if streamed else NO_FIRST)
    assert outcome.actual["output_tokens"] == decision.actual["output_tokens"] > 0
    assert 0.0 < outcome.actual["decode"] <= outcome.actual["total"]
    if streamed:
        assert outcome.actual["first_token"] < outcome.actual["total"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_async_answer_has_one(one: One, streamed: bool) -> None:
    async with AsyncClient(router=one[1]) as client:
        answer = await client.chat(MODEL, MESSAGES, stream=streamed)
        if streamed:
            parts = [part async for part in answer]
            answer = parts[-1]

    assert set(answer.routing_decision.outcome.actual) == (set(TERMS) if streamed else NO_FIRST)


def test_an_answer_in_another_form_has_what_is_told(told: list[RoutingDecision]) -> None:
    chat = {"model": MODEL, "messages": MESSAGES}
    texts = {"model": EMBEDS, "input": ["Lighthouses"]}
    with (
        preloaded(make_nodes("a", models=(MODEL, EMBEDS)), MODEL, EMBEDS) as cluster,
        make_router(cluster, on_decision=told.append) as router,
        httpx.Client(transport=HydraTransport(router=router)) as client,
    ):
        client.post("http://hydra/v1/chat/completions", json=chat)
        client.post("http://hydra/api/embed", json=texts)

    of_chat, of_texts = (decision.outcome for decision in told)
    assert of_chat is not None
    assert set(of_chat.actual) == {"total", "prompt_tokens", "output_tokens"}
    assert of_texts is not None
    assert of_texts.predicted["output_tokens"] == 0.0
    assert {"prefill", "total"} <= set(of_texts.actual) <= NO_FIRST - {"wait", "decode"}


def test_the_time_in_the_line_is_waiting_and_was_foreseen(
    told: list[RoutingDecision],
) -> None:
    with (
        preloaded(make_nodes("a", speed=10.0), MODEL) as cluster,
        make_router(cluster, on_decision=told.append) as router,
        Client(router=router) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        client.chat(MODEL, MESSAGES)
        list(pool.map(lambda _: client.chat(MODEL, MESSAGES), range(6)))

    in_line = [d for d in told[1:] if d.actual is not None and d.actual["queued"] > 0.02]
    assert in_line
    for decision in in_line:
        assert decision.actual is not None
        assert decision.outcome is not None
        assert decision.outcome.predicted["wait"] > 0.0
        assert decision.outcome.actual["wait"] >= decision.actual["queued"] - 0.01
        assert decision.outcome.actual["total"] == pytest.approx(decision.actual["total"], abs=0.02)
    # A place in the line is worth more than a place at the runner.
    last = max(told, key=lambda d: (d.actual or {})["queued"])
    assert last.outcome is not None
    assert last.predicted is not None
    assert last.outcome.predicted["wait"] > last.predicted["wait"]


def test_after_a_failover_it_counts_from_when_the_next_node_was_looked_for() -> None:
    with preloaded(make_nodes("a", "b"), MODEL) as cluster, make_router(cluster) as router:
        cluster["a"].inject(StatusFault(status=500))
        with Client(router=router) as client:
            decision = client.chat(MODEL, MESSAGES, node_id="a").routing_decision

    assert [attempt.outcome for attempt in decision.attempts] != ["ok"]
    assert decision.outcome.node_id == "b"
    assert 0.0 < decision.outcome.actual["total"] < decision.actual["total"]


def test_a_stream_that_somebody_else_has_read_does_not_show_its_first_token(one: One) -> None:
    # As with LiteLLM, which tells of no more than the end.
    payload = {"model": MODEL, "messages": MESSAGES}
    one[1].wait_until_seen()
    dispatch = Dispatch(one[1], read_call("POST", "/api/chat", payload), RoutingWords(), b"")
    dispatch.acquire()
    dispatch.complete(None)

    outcome = dispatch.decision().outcome
    assert outcome is not None
    assert set(outcome.actual) == {"total"}


def test_what_went_wrong_has_none(one: One, told: list[RoutingDecision]) -> None:
    cluster, router = one
    with Client(router=router) as client:
        next(iter(client.chat(MODEL, MESSAGES, stream=True)))  # and nobody reads on
        cluster["a"].inject(TokenFault(after=2))
        with pytest.raises(StreamBrokenError):
            list(client.chat(MODEL, MESSAGES, stream=True))

    assert [decision.attempts[-1].outcome for decision in told] == ["cancelled", "reset"]
    assert [decision.outcome for decision in told] == [None, None]


def test_what_two_nodes_have_written_has_none(told: list[RoutingDecision]) -> None:
    counts = SimulatedModel(
        "counts", behaviour=Behaviour("count", go_token="<|go_count|>"), template="open"
    )
    with (
        preloaded(make_nodes("a", "b", models=(counts,)), "counts") as cluster,
        make_router(cluster, on_decision=told.append) as router,
        Client(router=router) as client,
    ):
        cluster["a"].inject(TokenFault(after=3))
        list(client.chat("counts", MESSAGES, stream=True, continue_streams=True, node_id="a"))

    assert told[-1].continued is not None
    assert told[-1].actual is not None
    assert told[-1].outcome is None


def test_a_call_that_only_loads_has_none(one: One, told: list[RoutingDecision]) -> None:
    with Client(router=one[1]) as client:
        client.generate(MODEL)

    assert [attempt.outcome for attempt in told[-1].attempts] == ["ok"]
    assert told[-1].outcome is None


def test_there_is_no_word_of_a_prompt_or_an_answer_in_it(one: One) -> None:
    with Client(router=one[1]) as client:
        answer = client.chat(MODEL, MESSAGES)

    told = json.dumps(answer.routing_decision.to_dict())
    assert '"outcome": {"node_id": "a"' in told
    assert "lighthouse" not in told.lower()
    assert answer.message.content not in told
