"""How long a node is waited for that is never silent for long, and one that has gone silent."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import httpcore
import httpx
import pytest

from hydra_llm import AsyncClient, Client, DeadlineError, Router, StreamBrokenError
from hydra_llm.dispatch import LEARNED_IDLE_TOKENS, LEAST_LEARNED_IDLE_SECONDS, Dispatch
from hydra_llm.ollama.calls import read_call
from hydra_llm.patience import Patience, PatientBackend
from hydra_llm.testing import (
    EndlessFault,
    Fault,
    HangFault,
    SimulatedCluster,
    SlowFault,
    SlowLorisFault,
    StallFault,
)
from hydra_llm.types import Speed
from hydra_llm.words import NO_WORDS, read_words
from tests.router.conftest import MODEL, make_nodes, make_router

MESSAGES = [{"role": "user", "content": "Hello"}]
PAUSE = 0.05
LIMIT = 0.4
"""Seconds; each silence is far shorter, and all of them together are far longer."""


@pytest.fixture
def router(cluster: SimulatedCluster) -> Iterator[Router]:
    nodes = [node.node(labels=("first",) if node.id == "a" else ()) for node in cluster]
    with make_router(
        cluster,
        nodes=nodes,
        prefer_label_seconds=1000.0,
        first_byte_timeout=LIMIT,
        whole_answer_timeout=LIMIT,
        stream_idle_timeout=LIMIT,
        max_body_bytes=100_000,
    ) as router:
        yield router
        assert router.in_flight == 0


async def sync_parts(router: Router, *, stream: bool, **about: Any) -> AsyncGenerator[Any, None]:
    with Client(router=router, prefer_labels="first", **about) as client:
        answer = client.chat(MODEL, MESSAGES, stream=stream)
        for part in answer if stream else [answer]:
            yield part


async def async_parts(router: Router, *, stream: bool, **about: Any) -> AsyncGenerator[Any, None]:
    async with AsyncClient(router=router, prefer_labels="first", **about) as client:
        answer = await client.chat(MODEL, MESSAGES, stream=stream)
        if not stream:
            yield answer
            return
        async with aclosing(answer) as parts:
            async for part in parts:
                yield part


DOORS = pytest.mark.parametrize("ask", [sync_parts, async_parts], ids=["sync", "async"])
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
Ask = Callable[..., AsyncGenerator[Any, None]]


@DOORS
@WAYS
@pytest.mark.parametrize("after", [None, 0], ids=["headers", "first part"])
async def test_bytes_that_drip_hold_nobody_up_for_ever(
    ask: Ask, stream: bool, after: int | None, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(SlowLorisFault(after=after, pause_s=PAUSE))

    last = [part async for part in ask(router, stream=stream)][-1]

    first, second = last.routing_decision.attempts
    assert (first.node_id, first.outcome, second.outcome) == ("a", "timeout", "ok")
    assert LIMIT * 0.9 < first.seconds < 10 * LIMIT


@DOORS
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (SlowLorisFault(after=3, pause_s=PAUSE), "stayed silent for too long"),
        (StallFault(after=3), "stayed silent for too long"),
        (EndlessFault(after=3, pause_s=0.0), "sent more than 100000 bytes"),
        (EndlessFault(after=3, pause_s=0.0, in_one_line=True), "sent more than 100000 bytes"),
    ],
    ids=["drips", "stalls", "never ends", "never ends its line"],
)
async def test_in_the_middle_of_a_stream_it_is_an_error(
    ask: Ask, fault: Fault, why: str, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault)
    parts: list[Any] = []

    with pytest.raises(StreamBrokenError, match=f"the answer of a broke off after .*{why}"):
        async for part in ask(router, stream=True):
            parts.append(part)

    assert "".join(part.message.content for part in parts[:3])


@DOORS
async def test_an_answer_that_never_ends_is_another_nodes(
    ask: Ask, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(EndlessFault(pause_s=0.0))

    [answer] = [part async for part in ask(router, stream=False)]

    assert [a.outcome for a in answer.routing_decision.attempts] == ["protocol", "ok"]


@DOORS
async def test_a_stream_that_is_slow_but_steady_is_waited_for(
    ask: Ask, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(SlowFault(factor=2000.0))
    began = time.monotonic()
    count = 0
    async with aclosing(ask(router, stream=True)) as parts:
        async for _ in parts:
            count += 1
            if time.monotonic() - began > 3 * LIMIT:
                break

    assert count > 3
    assert time.monotonic() - began > 2 * LIMIT


def test_time_that_the_reader_takes_is_not_the_nodes(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who thinks for long between two parts finds the next one there."""
    offset = [0.0]
    clock = router._clock
    router._clock = lambda: clock() + offset[0]
    with Client(router=router) as client:
        parts = client.chat(MODEL, MESSAGES, stream=True)
        for number, _ in enumerate(parts):
            if number < 5:
                offset[0] += 10 * LIMIT


def judged(router: Router, node_id: str = "a") -> float:
    return next(node for node in router.nodes() if node.id == node_id).penalty_seconds


@DOORS
@pytest.mark.parametrize("when", ["before the first part", "in the middle"])
async def test_who_has_less_patience_than_the_settings_blames_no_node(
    ask: Ask, when: str, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(HangFault() if when == "before the first part" else StallFault(after=2))
    nodes = [node.node(labels=("first",) if node.id == "a" else ()) for node in cluster]
    with make_router(cluster, nodes=nodes, prefer_label_seconds=1000.0) as router:
        try:
            parts = [part async for part in ask(router, stream=True, timeout=0.2)]
        except StreamBrokenError as broken:
            attempts = broken.attempts
        else:
            attempts = parts[-1].routing_decision.attempts

        assert (attempts[0].node_id, attempts[0].outcome) == ("a", "timeout")
        assert judged(router) == 0.0
        assert router.in_flight == 0


@DOORS
async def test_a_deadline_that_passes_blames_no_node(ask: Ask, cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.inject(HangFault())
    # One token is expected to be there in time, so it is sent.
    with make_router(cluster, default_output_tokens=1) as router:
        with pytest.raises(DeadlineError, match=r"nodes tried: \w \(timeout\)"):
            [part async for part in ask(router, stream=True, deadline_s=0.8)]

        assert [judged(router, node.id) for node in cluster] == [0.0, 0.0, 0.0]


@DOORS
async def test_who_waits_as_long_as_the_settings_say_does_blame_it(
    ask: Ask, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(HangFault())

    assert [part async for part in ask(router, stream=True)]
    assert judged(router) > 0.0


# --------------------------------------------------------------- one part, one clock


class Silence(httpcore.NetworkStream):
    """Notes what it is asked to wait for."""

    def __init__(self) -> None:
        self.waited: list[float | None] = []

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self.waited.append(timeout)
        return b"x"

    def close(self) -> None:
        pass


def test_a_read_waits_for_the_silence_or_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    silence = Silence()
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", lambda *about, **more: silence)
    stream = PatientBackend().connect_tcp("127.0.0.1", 1)
    patience = Patience(5.0, lambda: now[0])

    stream.read(1, patience)
    patience.begin(8.0)
    stream.read(1, patience)
    now[0] += 6.0
    stream.read(1, patience)
    patience.pause()
    now[0] += 1000.0
    patience.go_on()
    stream.read(1, patience)
    stream.read(1, 7.0)
    stream.read(1, None)
    now[0] += 2.0
    with pytest.raises(httpcore.ReadTimeout):
        stream.read(1, patience)

    assert silence.waited == [5.0, 5.0, 2.0, 2.0, 7.0, None]


@pytest.mark.parametrize(
    ("pace", "tools", "seconds"),
    [
        (None, False, 120.0),
        (0.02, False, LEAST_LEARNED_IDLE_SECONDS),
        (0.5, False, LEARNED_IDLE_TOKENS * 0.5),
        (60.0, False, 120.0),
        (0.02, True, 120.0),
    ],
    ids=["unknown", "quick", "slow", "as slow as can be", "may call a tool"],
)
def test_the_silence_of_a_stream_is_measured_in_the_nodes_pace(
    cluster: SimulatedCluster, pace: float | None, tools: bool, seconds: float
) -> None:
    payload: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    if tools:
        payload["tools"] = [{"type": "function", "function": {"name": "f"}}]
    with make_router(cluster) as router:
        router.nodes()
        for record in router._cluster._records.values():
            record.learner.speeds = {MODEL: Speed(decode_seconds_per_token=pace)}
            router._cluster._publish(record)
        dispatch = Dispatch(router, read_call("POST", "/api/chat", payload), NO_WORDS, b"")
        dispatch.acquire()
        asked = httpx.Request("POST", "http://hydra/api/chat")
        shorter = httpx.Request("POST", "http://hydra", extensions={"timeout": {"read": 3.0}})

        assert dispatch.patience(asked) == seconds
        assert dispatch.patience(shorter) == 3.0
        dispatch.put_back()


WARM = Speed(prefill_seconds_per_token=0.01, decode_seconds_per_token=0.05)
LOADS = Speed(prefill_seconds_per_token=0.01, decode_seconds_per_token=0.05, load_seconds=3.0)
ASKS: dict[str, tuple[Speed | None, dict[str, Any], dict[str, Any], float]] = {
    "unknown": (None, {}, {}, 300.0),
    "warm": (WARM, {}, {}, 30.0 + 10 * 0.05),
    "a load that is not known": (WARM, {}, {"loaded": False}, 300.0),
    "a load that is known": (LOADS, {}, {"loaded": False}, 30.0 + 10 * 3.05),
    "nobody else": (WARM, {}, {"exclude_nodes": "b"}, 300.0),
    "pinned": (WARM, {}, {"node_id": "a"}, 300.0),
    "whole, for as long as it may be": (WARM, {"stream": False}, {}, 1800.0),
    "whole, of ten tokens": (
        WARM,
        {"stream": False, "options": {"num_predict": 10}},
        {},
        30.0 + 10 * (0.05 + 10 * 0.05),
    ),
}


@pytest.mark.parametrize(("speed", "asked", "about", "seconds"), ASKS.values(), ids=ASKS.keys())
def test_a_node_is_waited_for_as_its_pace_says_while_others_could_take_over(
    speed: Speed | None, asked: dict[str, Any], about: dict[str, Any], seconds: float
) -> None:
    is_loaded = about.get("loaded", True)
    about = {name: value for name, value in about.items() if name != "loaded"}
    with SimulatedCluster(make_nodes("a", "b")) as cluster:
        if is_loaded:
            for node in cluster:
                node.preload(MODEL)
        with make_router(cluster) as router:
            router.nodes()
            for record in router._cluster._records.values():
                record.learner.speeds = {MODEL: speed} if speed else {}
                router._cluster._publish(record)
            payload = {"model": MODEL, "messages": MESSAGES, **asked}
            words = read_words(about)
            dispatch = Dispatch(router, read_call("POST", "/api/chat", payload), words, b"")
            dispatch.acquire()

            limits = dispatch.timeouts(httpx.Request("POST", "http://hydra/api/chat"))
            assert limits["read"] == pytest.approx(seconds, rel=0.2)
            dispatch.put_back()
