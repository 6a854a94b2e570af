"""What a caller of LangChain sees when nodes fail, and what is left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import operator
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from hydra_llm import (
    AllNodesFailedError,
    DeadlineError,
    Router,
    RoutingDecision,
    StreamBrokenError,
)
from hydra_llm.integrations.langchain import ChatHydra
from hydra_llm.testing import (
    Behaviour,
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HtmlFault,
    MissingModelFault,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    StallFault,
    StatusFault,
    TokenFault,
)
from tests.langchain.conftest import OTHER as CHAT
from tests.langchain.conftest import make_cluster
from tests.router.conftest import make_nodes, make_router, preloaded


def decision_of(answer: Any) -> dict[str, Any]:
    decision: dict[str, Any] = answer.response_metadata["routing_decision"]
    return decision


def shown(fault: Fault) -> str:
    figure = getattr(fault, "status", getattr(fault, "after", ""))
    return f"{type(fault).__name__} {figure}"


def outcomes(answer: AIMessage) -> list[tuple[str, str]]:
    return [(one["node_id"], one["outcome"]) for one in decision_of(answer)["attempts"]]


@pytest.fixture
def model(router: Router) -> ChatHydra:
    """Asks "a" first, and does not wait long for silence."""
    return ChatHydra(model=CHAT, router=router, prefer_labels=["first"])


@pytest.fixture
def router(cluster: SimulatedCluster) -> Any:
    known = [
        node.node(labels=("first",) * (node.id == "a") + ("second",) * (node.id == "b"))
        for node in cluster
    ]
    with make_router(
        cluster, nodes=known, prefer_label_seconds=30.0, first_byte_timeout=5.0,
        stream_idle_timeout=1.0,
    ) as router:  # fmt: skip
        yield router
        assert router.in_flight == router.waiting == 0


# ------------------------------------------------------------ before the first part

BEFORE: list[Fault] = [
    StatusFault(500),
    StatusFault(503),
    StatusFault(429),
    StatusFault(401),
    MissingModelFault(),
    ErrorBodyFault(),
    ErrorLineFault(after=0),
    ResetFault(),
    ResetFault(after=0),
    CutFault(after=0),
    HtmlFault(),
    TokenFault(after=0),
]


@pytest.mark.parametrize("fault", BEFORE, ids=shown)
def test_before_the_first_part_nobody_notices(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault, times=2)

    answer = model.invoke("Hi")
    chunks = list(model.stream("Hi", exclude_nodes=["b"]))

    assert len(outcomes(answer)) == 2
    assert outcomes(answer)[0][0] == "a"
    assert outcomes(answer)[1][1] == "ok"
    assert "after a (" in decision_of(answer)["reason"]
    assert answer.content
    assert chunks[-1].chunk_position == "last"


@pytest.mark.parametrize("fault", BEFORE, ids=shown)
async def test_before_the_first_part_nobody_notices_in_an_event_loop(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault, times=2)

    answer = await model.ainvoke("Hi")
    chunks = [chunk async for chunk in model.astream("Hi", exclude_nodes=["b"])]

    assert outcomes(answer)[0][0] == "a"
    assert outcomes(answer)[1][1] == "ok"
    assert chunks[-1].chunk_position == "last"


# ------------------------------------------------------------- after the first part

AFTER: list[Fault] = [
    ResetFault(after=3),
    CutFault(after=3),
    ErrorLineFault(after=3),
    StallFault(after=3),
    TokenFault(after=3),
]


@pytest.mark.parametrize("fault", AFTER, ids=shown)
def test_a_whole_answer_that_breaks_is_asked_for_elsewhere(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault, times=1)
    answer = model.invoke("Hi", prefer_labels=["first"])

    undisturbed = model.invoke("Hi", exclude_nodes=["a"])
    assert answer.content == undisturbed.content
    assert outcomes(answer)[0][0] == "a"
    assert outcomes(answer)[1][1] == "ok"
    decision = decision_of(answer)
    assert decision["selected_node"] in "bc"
    assert "after a (" in decision["reason"]
    assert len(RoutingDecision.from_dict(decision).attempts) == 2


@pytest.mark.parametrize("fault", AFTER, ids=shown)
async def test_a_whole_answer_that_breaks_is_asked_for_elsewhere_in_an_event_loop(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault, times=1)
    answer = await model.ainvoke("Hi")

    assert answer.content == (await model.ainvoke("Hi", exclude_nodes=["a"])).content
    assert outcomes(answer)[0][0] == "a"
    assert outcomes(answer)[1][1] == "ok"


@pytest.mark.parametrize("fault", AFTER, ids=shown)
def test_a_stream_that_breaks_is_an_error_that_names_the_node(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault)
    seen: list[Any] = []

    with pytest.raises(StreamBrokenError, match=r"^the answer of a ") as caught:
        for chunk in model.stream("Hi"):
            seen.append(chunk)  # noqa: PERF402  extend() would lose what came before the error

    assert caught.value.node_id == "a"
    assert [attempt.node_id for attempt in caught.value.attempts] == ["a"]
    assert caught.value.parts == len(seen) == 3
    assert not any("routing_decision" in chunk.response_metadata for chunk in seen)


@pytest.mark.parametrize("fault", AFTER, ids=shown)
async def test_an_async_stream_that_breaks_is_an_error_that_names_the_node(
    fault: Fault, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault)

    with pytest.raises(StreamBrokenError, match=r"^the answer of a "):
        async for _ in model.astream("Hi"):
            pass


@pytest.mark.parametrize("way", ["stream", "astream", "invoke"])
async def test_another_node_goes_on_if_that_is_asked_for(way: str) -> None:
    counting = SimulatedModel(
        CHAT, behaviour=Behaviour("count", go_token="<|go|>"), template="open"
    )
    with preloaded(make_nodes("a", "b", models=(counting,)), CHAT) as cluster:
        cluster["a"].inject(ResetFault(after=3))
        with make_router(cluster) as router:
            model = ChatHydra(
                model=CHAT, router=router, node_id="a", continue_streams=True, num_predict=8
            )
            if way == "invoke":
                answer = await asyncio.to_thread(model.invoke, "Hi")
            elif way == "stream":
                chunks = await asyncio.to_thread(lambda: list(model.stream("Hi")))
                answer = functools.reduce(operator.add, chunks)
            else:
                answer = functools.reduce(operator.add, [c async for c in model.astream("Hi")])

        assert answer.content == "".join(f" n{number:04}" for number in range(1, 9))
        assert decision_of(answer)["continued"] == {"from": "a", "after_parts": 3}
        assert outcomes(answer) == [("a", "reset"), ("b", "ok")]


@pytest.mark.parametrize("pin", ["prefer", "require"])
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_a_pinned_answer_that_breaks_stays_broken(
    where: str, pin: str, model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["b"].inject(CutFault(after=3))
    words: dict[str, Any] = {"node_id": "b", "pin": pin}

    with pytest.raises(StreamBrokenError, match="of b "):
        if where == "call":
            model.invoke("Hi", **words)
        else:
            model.with_routing(**words).invoke("Hi")
    assert len([r for r in cluster["b"].requests if r.path == "/api/chat"]) == 1


def test_a_call_that_takes_its_models_pin_away_is_asked_for_elsewhere(
    model: ChatHydra, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(CutFault(after=3))

    answer = model.with_routing(node_id="b").invoke("Hi", node_id=None)
    assert outcomes(answer)[1][1] == "ok"


@pytest.mark.parametrize(("max_retries", "tried"), [(0, 1), (1, 2), (2, 3), (9, 3)])
def test_an_answer_is_asked_for_again_max_retries_times_and_never_twice_of_a_node(
    max_retries: int, tried: int, router: Router, cluster: SimulatedCluster
) -> None:
    for node in cluster:
        node.inject(CutFault(after=3))
    model = ChatHydra(model=CHAT, router=router, max_retries=max_retries)

    with pytest.raises((AllNodesFailedError, StreamBrokenError)) as caught:
        model.invoke("Hi")

    asked = [node.id for node in cluster for r in node.requests if r.path == "/api/chat"]
    error: Any = caught.value
    assert isinstance(error, AllNodesFailedError) == (max_retries > 2)
    assert len(asked) == len(set(asked)) == tried
    assert sorted(attempt.node_id for attempt in error.attempts) == sorted(asked)


def test_the_deadline_goes_on_through_a_restart(router: Router, cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.inject(StallFault(after=3))
    model = ChatHydra(model=CHAT, router=router, deadline_s=0.7)

    begun = time.monotonic()
    with pytest.raises((DeadlineError, StreamBrokenError, AllNodesFailedError)):
        model.invoke("Hi")
    # Without one, each of three nodes would have been waited for during a second.
    assert time.monotonic() - begun < 2.0


def test_restarts_are_paid_for_from_the_retry_budget(cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.inject(CutFault(after=3))
    with make_router(cluster, retry_floor=0, retry_ratio=0.0) as router:
        with pytest.raises(AllNodesFailedError, match="the retry budget is spent"):
            ChatHydra(model=CHAT, router=router).invoke("Hi")


def test_callbacks_hear_the_beginning_again(model: ChatHydra, cluster: SimulatedCluster) -> None:
    """As docs/langchain.md says: a token callback of a whole answer may hear of two nodes."""
    from langchain_core.callbacks import BaseCallbackHandler

    heard: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            heard.append(token)

    cluster["a"].inject(CutFault(after=3), times=1)
    answer = model.invoke("Hi", {"callbacks": [Listener()]})

    assert heard[:3] == heard[3:6]
    assert "".join(heard[:3]).strip()
    assert "".join(heard[3:]) == answer.content


# ------------------------------------------------------------------------ many calls


async def test_fifty_calls_at_once_over_three_nodes_of_which_one_dies(
    router: Router, cluster: SimulatedCluster
) -> None:
    cluster["b"].inject(TokenFault(after=5), times=1)
    model = ChatHydra(model=CHAT, router=router)

    answers = await asyncio.gather(*(model.ainvoke(f"Say {i}") for i in range(50)))

    assert len(answers) == 50
    assert all(answer.content for answer in answers)
    tries = {one for answer in answers for one in outcomes(answer)}
    assert {node for node, outcome in tries if outcome != "ok"} == {"b"}
    served = Counter(decision_of(answer)["selected_node"] for answer in answers)
    assert served["a"] > 10
    assert served["c"] > 10


def test_a_batch_spreads_over_the_nodes(router: Router, cluster: SimulatedCluster) -> None:
    model = ChatHydra(model=CHAT, router=router)
    answers = model.batch([f"Say {i}" for i in range(24)], {"max_concurrency": 6})

    served = Counter(decision_of(answer)["selected_node"] for answer in answers)
    assert set(served) == {"a", "b", "c"}
    # How many each gets depends on how fast it was seen to be, and a busy machine disturbs that.
    assert max(served.values()) < 22


async def test_an_async_batch_spreads_over_the_nodes(
    router: Router, cluster: SimulatedCluster
) -> None:
    model = ChatHydra(model=CHAT, router=router)
    answers = await model.abatch([f"Say {i}" for i in range(24)], {"max_concurrency": 6})

    served = Counter(decision_of(answer)["selected_node"] for answer in answers)
    assert set(served) == {"a", "b", "c"}
    # How many each gets depends on how fast it was seen to be, and a busy machine disturbs that.
    assert max(served.values()) < 22


# ----------------------------------------------------------------------- what is left

SLOW: dict[str, Any] = {"speed": 2.0, "token_output": 400}


@pytest.fixture
def slow_node() -> Any:
    with make_cluster("a", **SLOW) as cluster:
        cluster["a"].preload(CHAT)
        yield cluster["a"]


def gone(node: SimulatedNode) -> bool:
    return any(record.outcome == "client left" for record in node.requests)


def left_within(seconds: float, node: SimulatedNode) -> bool:
    deadline = time.monotonic() + seconds
    while not gone(node) and time.monotonic() < deadline:
        time.sleep(0.005)
    return gone(node)


def test_breaking_off_a_stream_lets_go_of_the_node(slow_node: SimulatedNode) -> None:
    with Router(slow_node.node()) as router:
        for _ in ChatHydra(model=CHAT, router=router).stream("Hi"):
            break
        gc.collect()
        assert router.in_flight == 0
        assert left_within(0.5, slow_node)


BREAKS: dict[str, Callable[[ChatHydra], Any]] = {}


def a_break(function: Callable[[ChatHydra], Any]) -> Callable[[ChatHydra], Any]:
    BREAKS[function.__name__] = function
    return function


@a_break
async def by_break(model: ChatHydra) -> None:
    async for _ in model.astream("Hi"):
        break


@a_break
async def by_aclose(model: ChatHydra) -> None:
    stream = model.astream("Hi")
    await stream.__anext__()
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator


@a_break
async def by_cancel(model: ChatHydra) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in model.astream("Hi"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@a_break
async def by_cancelling_an_invoke(model: ChatHydra) -> None:
    task = asyncio.create_task(model.ainvoke("Hi"))
    while model.router.in_flight == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@a_break
async def by_time_out(model: ChatHydra) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(model.ainvoke("Hi"), 0.2)


@pytest.mark.parametrize("way", BREAKS)
async def test_breaking_off_in_an_event_loop_lets_go_of_the_node(
    way: str, slow_node: SimulatedNode
) -> None:
    async with Router(slow_node.node()) as router:
        await BREAKS[way](ChatHydra(model=CHAT, router=router))
        for _ in range(20):  # what breaks off by itself is closed by the loop, soon
            if router.in_flight == 0:
                break
            await asyncio.sleep(0.005)
        assert router.in_flight == 0
        assert await asyncio.to_thread(left_within, 0.5, slow_node)


def test_after_a_break_at_its_end_a_loop_has_nothing_to_say(slow_node: SimulatedNode) -> None:
    """``asyncio.run`` closes all generators at once; one must not close another's twice."""
    complaints: list[Any] = []
    with Router(slow_node.node()) as router:
        model = ChatHydra(model=CHAT, router=router)

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(
                lambda _, said: complaints.append(said)
            )
            async for _ in model.astream("Hi"):
                break

        asyncio.run(main())
        assert router.in_flight == 0
    assert complaints == []


def test_threads_share_one_model(router: Router) -> None:
    model, answers = ChatHydra(model=CHAT, router=router), list[Any]()
    threads = [
        threading.Thread(target=lambda i=i: answers.append(model.invoke(f"Say {i}")))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(answers) == 12
