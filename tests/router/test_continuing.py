"""Another node goes on with a stream that broke off, if that was asked for and can be done."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest

from hydra_llm import (
    AsyncClient,
    Client,
    Node,
    Router,
    StreamBrokenError,
    transport,
)
from hydra_llm.ollama.continuation import Told
from hydra_llm.testing import (
    Behaviour,
    CutFault,
    ErrorLineFault,
    Fault,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    StatusFault,
    TokenFault,
)
from tests.router.conftest import make_nodes, make_router
from tests.router.test_failover import until

RECORDINGS = Path(__file__).parents[1] / "recordings"
RECORDED = [
    json.loads((RECORDINGS / f"{version}-scenario-resume-on-second-node.json").read_text())
    for version in ("v0.24.0", "v0.32.15")
]
MESSAGES = [{"role": "user", "content": "Hello"}]
COUNT = "count-slow"


def counting(template: Any = "open", **about: Any) -> SimulatedModel:
    """The recordings' model: it counts, and goes on counting from where it is."""
    behaviour = Behaviour("count", go_token="<|go_count|>")
    return SimulatedModel(COUNT, behaviour=behaviour, template=template, **about)


@contextmanager
def two_nodes(
    model: SimulatedModel | None = None,
    *ids: str,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **about: Any,
) -> Iterator[tuple[SimulatedCluster, Router]]:
    """Node a is preferred, and every node has the model loaded."""
    made = make_nodes(*(ids or ("a", "b")), models=(model or counting(),), **about)
    with SimulatedCluster(made) as cluster:
        for node in cluster:
            node.preload(COUNT)
        first, *others = cluster
        nodes = [first.node(labels=("first",)), *(node.node() for node in others)]
        with make_router(cluster, nodes=nodes, prefer_label_seconds=1000.0, **settings) as router:
            yield cluster, router
            assert router.in_flight == 0
            assert router.waiting == 0


Ask = Callable[..., "AsyncGenerator[Any, None]"]


async def sync_parts(router: Router, **about: Any) -> AsyncGenerator[Any, None]:
    with Client(router=router, prefer_labels="first") as client:
        verb = client.generate if "prompt" in about else client.chat
        for part in verb(COUNT, stream=True, **about):
            yield part


async def async_parts(router: Router, **about: Any) -> AsyncGenerator[Any, None]:
    async with AsyncClient(router=router, prefer_labels="first") as client:
        verb = client.generate if "prompt" in about else client.chat
        async with aclosing(await verb(COUNT, stream=True, **about)) as parts:
            async for part in parts:
                yield part


DOORS = pytest.mark.parametrize("ask", [sync_parts, async_parts], ids=["sync", "async"])


async def heard(parts: AsyncGenerator[Any, None], into: list[Any]) -> None:
    async for part in parts:
        into.append(part)


def asked(node: SimulatedNode) -> list[Mapping[str, Any]]:
    """The bodies of the chats and prompts that a node got, but for what only shows a prompt."""
    return [
        r.body
        for r in node.requests
        if r.path in ("/api/chat", "/api/generate")
        and r.body is not None
        and not r.body.get("_debug_render_only")
    ]


def rendered(node: SimulatedNode) -> int:
    return sum(1 for r in node.requests if (r.body or {}).get("_debug_render_only"))


DEATHS: dict[str, Fault] = {
    "killed": TokenFault(after=10),
    "reset": ResetFault(after=10),
    "runner died": ErrorLineFault(after=10),
}


@DOORS
@pytest.mark.parametrize("fault", DEATHS.values(), ids=DEATHS.keys())
@pytest.mark.parametrize("recorded", RECORDED, ids=[r["ollama_version"] for r in RECORDED])
async def test_the_joined_text_is_the_unbroken_one(
    ask: Ask, fault: Fault, recorded: dict[str, Any]
) -> None:
    scenario = recorded["scenario"]
    chunks = [json.loads(c["line"]) for c in scenario["stream_from_B"]["chunks"]]
    whole = scenario["text_received_from_A"] + "".join(c["message"]["content"] for c in chunks)
    parts: list[Any] = []

    with two_nodes(version=recorded["ollama_version"]) as (cluster, router):
        cluster["a"].inject(fault)
        asking = {key: scenario["request_to_A"][key] for key in ("messages", "options")}
        await heard(ask(router, continue_streams=True, **asking), parts)

        assert "".join(part.message.content for part in parts) == whole
        (sent,) = asked(cluster["b"])
        assert sent["messages"] == scenario["request_to_B"]["messages"]
        assert sent["options"]["num_predict"] == scenario["request_to_B"]["options"]["num_predict"]
        assert rendered(cluster["b"]) == 1
        assert len(cluster["b"].loads) == 0


@DOORS
async def test_it_is_marked_in_the_stream_and_in_the_decision(ask: Ask) -> None:
    parts: list[Any] = []
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        await heard(
            ask(router, continue_streams=True, messages=MESSAGES, options={"num_predict": 9}), parts
        )

    assert [part.continued_from for part in parts] == [None] * 3 + ["a"] + [None] * (len(parts) - 4)
    decision = parts[-1].routing_decision
    assert decision["continued"] == {"from": "a", "after_parts": 3}
    assert [(a["node_id"], a["outcome"]) for a in decision["attempts"]] == [
        ("a", "reset"),
        ("b", "ok"),
    ]
    assert decision.reason.endswith(", to go on with the answer of a after its 3 parts")
    assert decision["actual"]["first_token"] <= decision["actual"]["total"]


@DOORS
async def test_without_being_asked_for_it_is_never_done(ask: Ask) -> None:
    parts: list[Any] = []
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        with pytest.raises(StreamBrokenError) as caught:
            await heard(ask(router, messages=MESSAGES), parts)

        assert len(parts) == 3
        assert "continued" not in str(caught.value)
        assert asked(cluster["b"]) == []


@DOORS
async def test_it_can_be_a_setting_that_a_call_overrules(ask: Ask) -> None:
    with two_nodes(settings={"continue_streams": True}) as (cluster, router):
        cluster["a"].inject(ResetFault(after=3))
        parts: list[Any] = []
        await heard(ask(router, messages=MESSAGES, options={"num_predict": 8}), parts)
        assert parts[-1].routing_decision["continued"] == {"from": "a", "after_parts": 3}

        with pytest.raises(StreamBrokenError):
            await heard(ask(router, messages=MESSAGES, continue_streams=False), [])


REFUSED: dict[str, tuple[SimulatedModel, dict[str, Any], dict[str, Any], str]] = {
    "a template that closes": (
        counting("closed"),
        {},
        {"messages": MESSAGES},
        "on b the model's template would begin a new turn",
    ),
    "a template that repeats": (
        counting("native"),
        {"go_template": False},
        {"messages": MESSAGES},
        "b repeats the text so far",
    ),
    "a format": (
        counting(),
        {},
        {"messages": MESSAGES, "format": "json"},
        "an answer in a format cannot be",
    ),
    "tools": (
        counting(capabilities=("completion", "tools")),
        {},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "an answer that may call tools cannot be",
    ),
    "a prompt in a template": (
        counting(),
        {},
        {"prompt": "Hello"},
        "of /api/generate only raw prompts can be continued",
    ),
}


@DOORS
@pytest.mark.parametrize(("model", "about", "asking", "why"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_cannot_be_continued_says_why(
    ask: Ask, model: SimulatedModel, about: dict[str, Any], asking: dict[str, Any], why: str
) -> None:
    parts: list[Any] = []
    with two_nodes(model, **about) as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        with pytest.raises(StreamBrokenError) as caught:
            await heard(ask(router, continue_streams=True, **asking), parts)

        assert len(parts) == 3
        assert str(caught.value).endswith(f"; not continued: {why}")
        assert (caught.value.node_id, caught.value.parts) == ("a", 3)
        assert [(a.node_id, a.outcome) for a in caught.value.attempts] == [("a", "reset")]
        await until(lambda: not cluster["b"].in_flight)


@DOORS
async def test_thinking_is_not_carried_over(ask: Ask) -> None:
    model = SimulatedModel(COUNT, capabilities=("completion", "thinking"), template="open")
    parts: list[Any] = []
    with two_nodes(model) as (cluster, router):
        cluster["a"].inject(TokenFault(after=2))
        with pytest.raises(StreamBrokenError, match="thinking cannot be carried over"):
            await heard(ask(router, continue_streams=True, messages=MESSAGES, think=True), parts)

        assert asked(cluster["b"]) == []


@DOORS
async def test_a_raw_prompt_goes_on_without_a_look_at_the_template(ask: Ask) -> None:
    parts: list[Any] = []
    with two_nodes(counting("closed")) as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        await heard(
            ask(
                router,
                continue_streams=True,
                prompt="<|go_count|> n0001",
                raw=True,
                options={"num_predict": 6},
            ),
            parts,
        )

        assert "".join(p.response for p in parts) == " n0002 n0003 n0004 n0005 n0006 n0007"
        assert rendered(cluster["b"]) == 0


@DOORS
async def test_an_answer_that_the_caller_began_goes_on_in_one_message(ask: Ask) -> None:
    began = [*MESSAGES, {"role": "assistant", "content": " n0041"}]
    parts: list[Any] = []
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=2))
        await heard(
            ask(router, continue_streams=True, messages=began, options={"num_predict": 4}), parts
        )

        assert "".join(p.message.content for p in parts) == " n0042 n0043 n0044 n0045"
        (sent,) = asked(cluster["b"])
        assert sent["messages"][-1] == {"role": "assistant", "content": " n0041 n0042 n0043"}


@DOORS
async def test_it_is_done_once(ask: Ask) -> None:
    parts: list[Any] = []
    with two_nodes(None, "a", "b", "c") as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        cluster["b"].inject(TokenFault(after=4))
        cluster["c"].inject(TokenFault(after=4))
        with pytest.raises(StreamBrokenError) as caught:
            await heard(ask(router, continue_streams=True, messages=MESSAGES), parts)

        assert len(parts) == caught.value.parts == 7
        text = "".join(part.message.content for part in parts)
        assert text == "".join(f" n{number:04}" for number in range(1, 8))
        assert [a.outcome for a in caught.value.attempts] == ["reset", "reset"]


@DOORS
@pytest.mark.parametrize("where", ["the prompt", "the answer"])
async def test_a_node_that_fails_to_go_on_is_told_of_and_judged(ask: Ask, where: str) -> None:
    parts: list[Any] = []
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        if where == "the prompt":
            cluster["b"].inject(StatusFault(status=500))
        else:
            cluster["b"].inject(ErrorLineFault(after=0))
        with pytest.raises(StreamBrokenError, match="not continued: b answered with") as caught:
            await heard(ask(router, continue_streams=True, messages=MESSAGES), parts)

        outcomes = [(a.node_id, a.outcome) for a in caught.value.attempts]
        assert outcomes == [("a", "reset"), ("b", "error_response")]
        assert caught.value.node_id == "a"


@DOORS
async def test_nobody_else_may_go_on_with_a_required_pin(ask: Ask) -> None:
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        with pytest.raises(StreamBrokenError, match="not continued: 1 node tried for"):
            await heard(
                ask(router, continue_streams=True, messages=MESSAGES, node_id="a", pin="require"),
                [],
            )


@DOORS
async def test_a_model_that_repeats_itself_is_not_asked_once_more(ask: Ask) -> None:
    with two_nodes() as (cluster, router):
        cluster["a"].inject(CutFault(after=3))
        with pytest.raises(StreamBrokenError, match="without being complete"):
            await heard(ask(router, continue_streams=True, messages=MESSAGES), [])

        assert asked(cluster["b"]) == []


@DOORS
async def test_nothing_is_left_to_write_once_num_predict_is_reached(ask: Ask) -> None:
    with two_nodes() as (cluster, router):
        cluster["a"].inject(ResetFault(after=3))
        with pytest.raises(StreamBrokenError, match="num_predict leaves nothing to be written"):
            await heard(
                ask(router, continue_streams=True, messages=MESSAGES, options={"num_predict": 3}),
                [],
            )

        assert asked(cluster["b"]) == []


def test_of_a_line_that_was_cut_the_caller_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    send = transport._send

    def cut(router: Router, node: Node, outgoing: httpx.Request) -> httpx.Response:
        response = send(router, node, outgoing)
        if node.id == "a":
            response.stream = CutInALine(response.stream)
        return response

    monkeypatch.setattr(transport, "_send", cut)
    with two_nodes() as (_, router), Client(router=router, prefer_labels="first") as client:
        parts = list(
            client.chat(
                COUNT, MESSAGES, stream=True, continue_streams=True, options={"num_predict": 6}
            )
        )

    text = "".join(part.message.content for part in parts)
    assert text == "".join(f" n{number:04}" for number in range(1, 7))
    assert parts[2].continued_from == "a"


class CutInALine(httpx.SyncByteStream):
    """Two and a half lines of an answer."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        data = b""
        for part in self._stream:
            data += part
            if data.count(b"\n") > 2:
                break
        first, second, third, *_ = data.split(b"\n")
        yield first + b"\n" + second + b"\n" + third[:30]
        raise httpx.ReadError("the other side has gone")

    def close(self) -> None:
        self._stream.close()


@DOORS
async def test_a_caller_who_leaves_leaves_the_second_node_too(ask: Ask) -> None:
    with two_nodes() as (cluster, router):
        cluster["a"].inject(TokenFault(after=3))
        parts = ask(router, continue_streams=True, messages=MESSAGES)
        for _ in range(5):
            await parts.__anext__()
        await parts.aclose()
        # The fixture sees to it that nothing is left.
        assert len(asked(cluster["b"])) == 1


def test_a_line_is_handed_on_as_a_whole() -> None:
    told = Told()
    first = b'{"message":{"content":"one"},"done":false}\n'
    second = b'{"message":{"content":" two"},"done":false}\n'

    assert told.whole(first + second[:20]) == first
    assert told.text == "one"
    assert told.whole(second[20:]) == second
    assert (told.text, told.parts, told.tokens) == ("one two", 2, 2)
    assert told.whole(b"{") == b""
    told.forget_rest()
    assert told.rest() == b""
