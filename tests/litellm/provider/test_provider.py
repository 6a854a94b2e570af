"""What a caller of LiteLLM sees of the provider `hydra/`, and what its nodes see of the caller."""

from __future__ import annotations

import asyncio
import base64
import copy
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from litellm.litellm_core_utils.thread_pool_executor import executor

from hydra_llm import Router, RoutingDecision
from hydra_llm.integrations.litellm import provider as provider_module
from hydra_llm.integrations.litellm import register_provider
from hydra_llm.integrations.litellm.errors import MODEL_MISSING, PASSING
from hydra_llm.integrations.litellm.provider import HydraProvider
from hydra_llm.integrations.litellm.provider_chat import StreamReader
from hydra_llm.integrations.litellm.telling import as_header
from hydra_llm.scheduling.filters import REASONS
from hydra_llm.testing import (
    CutFault,
    Fault,
    HangFault,
    MissingModelFault,
    RequestRecord,
    ResetFault,
    SimulatedCluster,
    SimulatedNode,
    StallFault,
    StatusFault,
)
from tests.litellm.provider.conftest import CHAT, EMBEDDING, MODELS, PLAIN, litellm
from tests.router.conftest import make_router

pytestmark = [
    pytest.mark.usefixtures("provider"),
    pytest.mark.leaks(reason="LiteLLM logs in threads and tasks that it keeps"),
    # LiteLLM's own, when it first makes models of its types.
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning"),
    # LiteLLM's own, when it looks whether a chunk is empty.
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
]

SECRET = "the treasure lies under the old oak"
HELLO = [{"role": "user", "content": SECRET}]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
                "unit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            },
            "required": ["place"],
        },
    },
}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}

# ------------------------------------------------------------------------- helpers


def whole(**call: Any) -> Any:
    return litellm.completion(**call)


def awhole(**call: Any) -> Any:
    return asyncio.run(litellm.acompletion(**call))


def stream(**call: Any) -> Any:
    return built(list(litellm.completion(stream=True, **call)), call)


def astream(**call: Any) -> Any:
    async def run() -> list[Any]:
        return [chunk async for chunk in await litellm.acompletion(stream=True, **call)]

    return built(asyncio.run(run()), call)


def built(chunks: list[Any], call: dict[str, Any]) -> Any:
    answer = litellm.stream_chunk_builder(chunks, messages=call["messages"])
    answer._hidden_params = chunks[0]._hidden_params  # LiteLLM does so itself since 1.107 or so
    return answer


Ask = Callable[..., Any]


@pytest.fixture(params=[whole, awhole, stream, astream], ids=lambda way: way.__name__)
def ask(request: pytest.FixtureRequest) -> Ask:
    """One of the four ways to an answer; they are to give the same."""
    way: Ask = request.param
    return lambda model=CHAT, messages=HELLO, **call: way(
        model=f"hydra/{model}", messages=copy.deepcopy(messages), **call
    )


def chat(model: str = CHAT, messages: Any = HELLO, **call: Any) -> Any:
    return whole(model=f"hydra/{model}", messages=messages, **call)


def requests_of(cluster: SimulatedCluster) -> list[RequestRecord]:
    found = [r for node in cluster for r in node.requests if r.path in ("/api/chat", "/api/embed")]
    return sorted(found, key=lambda record: record.at)


def sent(cluster: SimulatedCluster) -> Mapping[str, Any]:
    """The body of the latest request."""
    return requests_of(cluster)[-1].body


def options_sent(cluster: SimulatedCluster) -> dict[str, Any]:
    """Its options, without the context that the router fills in from what is loaded."""
    return {name: value for name, value in sent(cluster)["options"].items() if name != "num_ctx"}


def decision(answer: Any) -> dict[str, Any]:
    told: dict[str, Any] = answer._hidden_params["routing_decision"]
    return told


def wait_for_leases(router: Router) -> None:
    until = time.monotonic() + 2
    while router.in_flight and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    assert router.in_flight == 0


# -------------------------------------------------------------------------- answers


def test_an_answer_has_text_usage_and_the_decision(ask: Ask, cluster: SimulatedCluster) -> None:
    answer = ask(PLAIN, max_tokens=5)

    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content.split()) == 5
    assert answer.choices[0].finish_reason == "length"
    [request] = requests_of(cluster)
    told = decision(answer)
    assert request.body["options"]["num_predict"] == 5
    assert request.body in [r.body for r in cluster[told["selected_node"]].requests]
    assert answer.usage.completion_tokens == 5 == told["actual"]["output_tokens"]
    assert answer.usage.prompt_tokens == told["actual"]["prompt_tokens"] > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert json.dumps(told)


def test_an_answer_that_ends_by_itself_has_stopped(ask: Ask) -> None:
    assert ask(PLAIN).choices[0].finish_reason == "stop"


def test_thinking_is_reasoning_and_no_text(ask: Ask, cluster: SimulatedCluster) -> None:
    message = ask(think="high").choices[0].message

    assert message.reasoning_content
    assert message.content
    assert message.reasoning_content not in message.content
    assert sent(cluster)["think"] == "high"


def test_a_tool_is_called(ask: Ask, cluster: SimulatedCluster) -> None:
    answer = ask(tools=[WEATHER], think=False)

    [call] = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert sent(cluster)["tools"] == [WEATHER]  # the nested parts of its schema too


def test_a_schema_is_held(ask: Ask, cluster: SimulatedCluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = ask(PLAIN, response_format=form)

    assert "name" in json.loads(answer.choices[0].message.content)
    assert sent(cluster)["format"]["properties"] == SCHEMA["properties"]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_texts_are_embedded(is_async: bool, cluster: SimulatedCluster) -> None:
    call: dict[str, Any] = {
        "model": f"hydra/{EMBEDDING}",
        "input": ["one", "two words"],
        "node_id": "b",
        "extra_body": {"dimensions": 6, "hydra": {"pin": "require"}},
        "keep_alive": "9m",
        "num_ctx": 512,
    }
    answer = asyncio.run(litellm.aembedding(**call)) if is_async else litellm.embedding(**call)

    assert [one["index"] for one in answer.data] == [0, 1]
    assert all(isinstance(figure, float) for figure in answer.data[1]["embedding"])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert decision(answer)["selected_node"] == "b"
    body = dict(sent(cluster))
    assert body.pop("input") == ["one", "two words"]
    assert body == {
        "model": EMBEDDING, "dimensions": 6, "keep_alive": "9m", "options": {"num_ctx": 512},
    }  # fmt: skip


def test_chunks_come_one_by_one_with_one_id_and_end_once() -> None:
    answer = litellm.completion(
        model=f"hydra/{CHAT}", messages=HELLO, stream=True, think=True, max_tokens=40
    )
    chunks = list(answer)

    assert len(chunks) > 10
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [bool(delta.role) for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [*[None] * (len(chunks) - 1), "length"]
    assert deltas[0].reasoning_content
    assert not deltas[0].content


def test_usage_ends_a_stream_that_asked_for_it() -> None:
    chunks = list(
        litellm.completion(
            model=f"hydra/{PLAIN}", messages=HELLO, stream=True, max_tokens=4,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip

    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert [usage.completion_tokens for usage in usages] == [4]


def test_counts_stand_on_a_chunk_and_beside_it_for_who_puts_chunks_together() -> None:
    part = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}
    reader = StreamReader(PLAIN)
    counts, end = reader.chunks_of(part, RoutingDecision(model=PLAIN))

    assert counts.usage.total_tokens == counts._hidden_params["usage"].total_tokens == 5
    assert (counts.choices[0].finish_reason, end.choices[0].finish_reason) == (None, "stop")


class Saying:
    """A transport whose node says this, in pieces that end anywhere."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def _answer(self, stream: Any) -> httpx.Response:
        decided = SimpleNamespace(decision=lambda: RoutingDecision(model=PLAIN))
        return httpx.Response(200, stream=stream, extensions={"hydra_dispatch": decided})

    def handle_request(self, _: httpx.Request) -> httpx.Response:
        return self._answer(Pieces(self.pieces))

    async def handle_async_request(self, _: httpx.Request) -> httpx.Response:
        return self._answer(Pieces(self.pieces))


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, pieces: tuple[bytes, ...]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_stream_is_cut_at_its_newlines_and_the_last_may_be_missing(is_async: bool) -> None:
    handler = HydraProvider()
    said = '{"message": {"content": "a\u0085b"}}\n{"done": true, "eval_count": 2}'.encode()
    handler._transports = (Saying(said[:27], said[27:]),) * 2  # type: ignore[assignment]
    call: dict[str, Any] = {"model": PLAIN, "messages": HELLO, "optional_params": {}}

    async def run() -> list[Any]:
        return [chunk async for chunk in handler.astreaming(**call)]

    chunks = asyncio.run(run()) if is_async else list(handler.streaming(**call))
    text, counts, end = chunks
    assert text.choices[0].delta.content == "a\u0085b"
    assert counts.usage.completion_tokens == 2
    assert end.choices[0].finish_reason == "stop"


# --------------------------------------------------------------------- what is sent


def test_parameters_become_what_ollama_calls_them(cluster: SimulatedCluster) -> None:
    chat(
        PLAIN, temperature=0.1, top_p=0.9, top_k=7, seed=3, stop="END", max_completion_tokens=6,
        frequency_penalty=0.0, presence_penalty=0.5, num_ctx=2048, keep_alive="7m", user="me",
        n=1, min_p=0.05,
    )  # fmt: skip

    body = dict(sent(cluster))
    assert body.pop("messages")[0]["content"] == SECRET
    assert body == {
        "model": PLAIN,
        "stream": False,
        "keep_alive": "7m",
        "options": {
            "temperature": 0.1, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["END"],
            "num_predict": 6, "frequency_penalty": 0.0, "presence_penalty": 0.5, "num_ctx": 2048,
            "min_p": 0.05,
        },
    }  # fmt: skip


def test_messages_with_images_calls_and_results(cluster: SimulatedCluster) -> None:
    called = {
        "id": "c1", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"place": {"city": "Oslo"}}'},
    }  # fmt: skip
    chat(
        messages=[
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ]},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
        max_tokens=3,
    )  # fmt: skip

    system, user, assistant, tool = sent(cluster)["messages"]
    assert (system["role"], system["content"]) == ("system", "Be terse.")
    assert (user["content"], user["images"]) == ("What is this?", [PNG])
    [call] = assistant["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": {"place": {"city": "Oslo"}}}
    assert (tool["role"], tool["content"], tool["tool_name"]) == ("tool", "rain", "get_weather")


def test_an_image_is_never_a_file_of_this_machine(cluster: SimulatedCluster, tmp_path: Any) -> None:
    file = tmp_path / "private"
    file.write_text(SECRET)
    content = [{"type": "image_url", "image_url": {"url": str(file)}}]

    with pytest.raises(litellm.BadRequestError):
        chat(messages=[{"role": "user", "content": content}])

    assert base64.b64encode(SECRET.encode()).decode() not in json.dumps(sent(cluster))


def test_without_a_choice_of_tools_there_are_none(cluster: SimulatedCluster) -> None:
    answer = chat(tools=[WEATHER], tool_choice="none")

    assert not answer.choices[0].message.tool_calls
    assert "tools" not in sent(cluster)


def test_json_is_a_format(cluster: SimulatedCluster) -> None:
    answer = chat(PLAIN, response_format={"type": "json_object"})

    json.loads(answer.choices[0].message.content)
    assert sent(cluster)["format"] == "json"


@pytest.mark.parametrize("effort", ["low", "none"])
def test_reasoning_effort_is_think(effort: str, cluster: SimulatedCluster) -> None:
    chat(reasoning_effort=effort, allowed_openai_params=["reasoning_effort"], max_tokens=3)
    allowed = sent(cluster)["think"]
    chat(extra_body={"reasoning_effort": effort}, max_tokens=3)

    assert allowed is sent(cluster)["think"] is (effort == "low")


def test_what_litellm_drops_everywhere_is_dropped(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "drop_params", True)
    chat(PLAIN, n=2, max_tokens=2)

    assert options_sent(cluster) == {"num_predict": 2}


def test_what_ollama_has_no_word_for_is_refused_or_dropped(cluster: SimulatedCluster) -> None:
    with pytest.raises(litellm.UnsupportedParamsError, match=r"\['logit_bias', 'n'\]"):
        chat(PLAIN, n=2, logit_bias={"1": 2})
    assert requests_of(cluster) == []

    chat(PLAIN, n=2, logit_bias={"1": 2}, max_tokens=2, drop_params=True)
    assert options_sent(cluster) == {"num_predict": 2}


# -------------------------------------------------------------------- routing words

WAYS_TO_SAY: dict[str, dict[str, Any]] = {
    "a key": {"node_id": "b", "pin": "require"},
    "hydra": {"hydra": {"node_id": "b", "priority": 7}},
    "metadata": {"metadata": {"hydra": {"node_id": "b", "priority": 7}, "else": 1}},
    "metadata as text": {"metadata": {"hydra": '{"node_id": "b"}'}},
    "litellm_metadata": {"litellm_metadata": {"hydra": {"node_id": "b"}}},
    "extra_body": {"extra_body": {"hydra": {"node_id": "b"}}},
    "a key of extra_body": {"extra_body": {"node_id": "b"}},
    "a header": {"proxy_server_request": {"headers": {"X-Hydra-Node-Id": "b", "accept": "*/*"}}},
    "the nearest": {"node_id": "b", "hydra": {"node_id": "a"}, "metadata": {"hydra": {}}},
    "hydra over metadata": {"hydra": {"node_id": "b"}, "metadata": {"hydra": {"node_id": "a"}}},
    "metadata over a header": {
        "metadata": {"hydra": {"node_id": "b"}},
        "proxy_server_request": {"headers": {"x-hydra-node-id": "a"}},
    },
    "all of them": {
        "node_id": "b", "min_vram_gb": 1.0, "prefer_local": False, "session": "s",
        "exclude_nodes": ["a"], "require_labels": [], "prefer_labels": [], "deadline_s": 60,
        "pin": "prefer", "vram": "prefer", "hydra": {"priority": 9},
    },
}  # fmt: skip


@pytest.mark.parametrize("said", WAYS_TO_SAY.values(), ids=WAYS_TO_SAY)
def test_words_are_heard_and_never_sent_on(said: dict[str, Any], cluster: SimulatedCluster) -> None:
    answer = chat(PLAIN, max_tokens=2, priority=3, **said)

    assert decision(answer)["selected_node"] == decision(answer)["requested_node"] == "b"
    [request] = requests_of(cluster)
    assert set(request.body) == {"model", "messages", "options", "stream"}
    assert options_sent(cluster) == {"num_predict": 2}
    assert not [name for name in request.headers if "hydra" in name.lower()]


def test_a_pin_is_heard_on_every_way(ask: Ask) -> None:
    assert decision(ask(PLAIN, max_tokens=2, node_id="b"))["selected_node"] == "b"


def test_the_decision_is_told_in_headers() -> None:
    answer = chat(PLAIN, max_tokens=2, node_id="b")

    headers = answer._hidden_params["additional_headers"]
    assert headers["llm_provider-x-hydra-node"] == "b"
    assert headers["llm_provider-x-hydra-attempts"] == "1"
    assert headers["llm_provider-x-hydra-reason"] == decision(answer)["reason"]


def test_headers_are_plain_text() -> None:
    assert as_header("größe\r\nset-cookie: →") == "gr??e set-cookie: ?"


# ------------------------------------------------------------------------- failures


def test_a_node_that_fails_costs_the_caller_nothing(ask: Ask, cluster: SimulatedCluster) -> None:
    cluster["a"].inject(ResetFault())
    answer = ask(PLAIN, max_tokens=3, node_id="a")

    attempts = [(one["node_id"], one["outcome"]) for one in decision(answer)["attempts"]]
    assert attempts == [("a", "reset"), ("b", "ok")]
    assert answer.choices[0].message.content


def test_embedding_fails_over_too(cluster: SimulatedCluster) -> None:
    cluster["a"].inject(StatusFault(500))
    answer = litellm.embedding(model=f"hydra/{EMBEDDING}", input="x", node_id="a")

    assert decision(answer)["selected_node"] == "b"
    assert answer._hidden_params["additional_headers"]["llm_provider-x-hydra-attempts"] == "2"


def break_all(cluster: SimulatedCluster, fault: Fault) -> None:
    for node in cluster:
        node.inject(fault)


@dataclass(frozen=True)
class Failing:
    """A call that cannot succeed, and what LiteLLM's caller is to get."""

    kind: Any
    status: int
    text: str
    call: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


FAILING = {
    "a misspelt word": Failing(
        litellm.BadRequestError, 400, "did you mean 'node_id'", {"hydra": {"nod_id": "a"}}
    ),
    "a wrong value": Failing(
        litellm.BadRequestError, 400, "min_vram_gb='much'", {"min_vram_gb": "much"}
    ),
    "words that are no object": Failing(
        litellm.BadRequestError, 400, "hydra should be an object", {"hydra": "b"}
    ),
    "more VRAM than there is": Failing(
        litellm.BadRequestError, 400, "2 short of VRAM", {"min_vram_gb": 900, "vram": "require"}
    ),
    "no such model": Failing(
        litellm.NotFoundError, 404, "ollama pull nope", {"model": "hydra/nope"}
    ),
    "the model is gone": Failing(
        litellm.NotFoundError, 404, "b (b does not have", fault=MissingModelFault()
    ),
    "Ollama refuses": Failing(
        litellm.BadRequestError, 400, "invalid think value", {"think": "sometimes"}
    ),
    "all nodes fail": Failing(
        litellm.ServiceUnavailableError, 503, "2 nodes tried", fault=StatusFault(status=500)
    ),
    "all nodes hang": Failing(
        litellm.Timeout, 408, "2 nodes tried", {"timeout": 0.15}, fault=HangFault()
    ),
    "no time": Failing(litellm.Timeout, 408, "1e-06 s have passed", {"deadline_s": 1e-6}),
}


# The other two ways share with one of these all that an error passes through.
@pytest.mark.parametrize("way", [whole, astream], ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", FAILING.values(), ids=FAILING)
def test_an_error_is_litellms_and_says_what_we_say(
    way: Ask, case: Failing, cluster: SimulatedCluster, router: Router
) -> None:
    if case.fault is not None:
        break_all(cluster, case.fault)
    with pytest.raises((case.kind, litellm.exceptions.MidStreamFallbackError)) as caught:
        way(**{"model": f"hydra/{PLAIN}", "messages": HELLO, **case.call})

    error: Any = caught.value
    # LiteLLM itself wraps what a stream ends with, so that its router asks elsewhere.
    if way is astream and case.status == 503:
        error = error.original_exception
    assert type(error) is case.kind
    assert error.status_code == case.status
    assert "hydra-llm: " in str(error)
    assert case.text in str(error)
    assert SECRET not in str(caught.value)
    wait_for_leases(router)


def test_a_sync_stream_that_cannot_begin_fails_at_the_call() -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="hydra/nope", messages=HELLO, stream=True)


def test_nobody_there_is_503(cluster: SimulatedCluster, router: Router) -> None:
    for node in cluster:
        node.kill()
    router.refresh()

    with pytest.raises(litellm.ServiceUnavailableError, match="2 down"):
        chat(PLAIN)


def test_messages_that_are_none_are_refused_without_being_told() -> None:
    function = {"name": "f", "arguments": f"{{{SECRET}"}
    messages = [{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": function}]}]  # fmt: skip

    with pytest.raises(litellm.BadRequestError) as caught:
        chat(messages=messages)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_reasons_that_pass_are_real_ones() -> None:
    assert PASSING | {MODEL_MISSING} <= REASONS


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_answer_that_breaks_off_says_so_and_names_the_node(
    is_async: bool, cluster: SimulatedCluster, router: Router
) -> None:
    break_all(cluster, CutFault(after=3))
    call: dict[str, Any] = {
        "model": f"hydra/{PLAIN}", "messages": HELLO, "stream": True, "node_id": "b",
    }  # fmt: skip
    seen: list[Any] = []

    async def run() -> None:
        async for chunk in await litellm.acompletion(**call):
            seen.append(chunk)

    with pytest.raises(litellm.ServiceUnavailableError) as caught:
        if is_async:
            asyncio.run(run())
        else:
            seen.extend(litellm.completion(**call))

    assert len(seen) == 3
    assert all(chunk.choices[0].finish_reason is None for chunk in seen)
    assert "hydra-llm: the answer of b ended" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(requests_of(cluster)) == 1
    wait_for_leases(router)


def test_a_stream_that_is_let_go_of_gives_its_place_back(
    cluster: SimulatedCluster, router: Router
) -> None:
    break_all(cluster, StallFault(after=2))
    call: dict[str, Any] = {"model": f"hydra/{PLAIN}", "messages": HELLO, "stream": True}

    answer = litellm.completion(**call)
    next(answer)
    assert router.in_flight == 1
    del answer
    wait_for_leases(router)

    litellm.completion(**call)  # not even looked at
    wait_for_leases(router)

    async def run() -> None:
        answer = await litellm.acompletion(**call)
        await anext(answer)
        assert router.in_flight == 1
        await answer.aclose()
        assert router.in_flight == 0

        answer = await litellm.acompletion(**call)
        await anext(answer)
        task = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await answer.aclose()
        assert router.in_flight == 0

    asyncio.run(run())


# -------------------------------------------------------------------------- parity


def comparable(answer: Any) -> dict[str, Any]:
    choice = answer.choices[0]
    calls = choice.message.tool_calls or []
    return {
        "content": choice.message.content,
        "reasoning": getattr(choice.message, "reasoning_content", None),
        "calls": [(call.function.name, json.loads(call.function.arguments)) for call in calls],
        "finish_reason": choice.finish_reason,
        "usage": (answer.usage.prompt_tokens, answer.usage.completion_tokens),
    }


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body without what we say better: the tool that a result is of, and the context."""
    messages = [{k: v for k, v in m.items() if k != "tool_name"} for m in body["messages"]]
    options = {"num_ctx": 4096, **body["options"]}  # what is loaded; the router says so
    return {**body, "messages": messages, "options": options}


SAME_AS_OLLAMA_CHAT: dict[str, dict[str, Any]] = {
    "text": {"temperature": 0.3, "seed": 1},
    "limited": {"max_tokens": 4},
    "tools": {"tools": [WEATHER], "think": False},
    "thinking": {"think": True},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "options": {"num_ctx": 4096, "top_k": 3, "keep_alive": "5m", "stop": ["x"]},
    "history": {
        "messages": [
            *HELLO,
            {"role": "assistant", "content": "", "tool_calls": [{
                "id": "c1", "type": "function",
                "function": {"name": "get_weather", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
    },
}  # fmt: skip


@pytest.fixture
def lone_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedNode]:
    """One node, known to `hydra/` too."""
    node = SimulatedNode("only", models=MODELS, speed=500.0, keep_alive_s=1e9)
    node.preload(CHAT)
    with SimulatedCluster([node]) as cluster, make_router(cluster) as router:
        register_provider(router)
        yield node


@pytest.mark.parametrize("way", [whole, stream], ids=lambda way: way.__name__)
@pytest.mark.parametrize("call", SAME_AS_OLLAMA_CHAT.values(), ids=SAME_AS_OLLAMA_CHAT)
def test_one_node_answers_as_through_ollama_chat(
    call: dict[str, Any], way: Ask, lone_node: SimulatedNode
) -> None:
    call = {"messages": HELLO, **call}
    theirs = way(model=f"ollama_chat/{CHAT}", api_base=lone_node.url, **copy.deepcopy(call))
    ours = way(model=f"hydra/{CHAT}", **copy.deepcopy(call))

    if "messages" not in call:  # what the simulation says hangs on all of the messages
        assert comparable(ours) == comparable(theirs)
    first, second = [r.body for r in lone_node.requests if r.path == "/api/chat"]
    assert plain(second) == plain(first)


# --------------------------------------------------------------------- registration


def test_litellm_knows_the_provider_before_its_first_request(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litellm, "provider_list", [])
    monkeypatch.setattr(litellm, "_custom_providers", [])
    register_provider(router)

    assert litellm.provider_list == litellm._custom_providers == ["hydra"]


def test_registering_twice_changes_nothing(router: Router) -> None:
    other = {"provider": "other", "custom_handler": HydraProvider()}
    litellm.custom_provider_map.insert(0, other)
    before = list(litellm.custom_provider_map)
    register_provider(router)

    assert litellm.custom_provider_map == before


def test_another_router_takes_the_place_of_the_first(cluster: SimulatedCluster) -> None:
    with make_router(cluster) as second:
        register_provider(second)
        [item] = litellm.custom_provider_map
        assert item["custom_handler"].router is second


def test_the_handler_for_the_proxy_reads_the_settings_at_its_first_request(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = HydraProvider()
    monkeypatch.setattr(provider_module, "handler", handler)
    monkeypatch.setenv("HYDRA_LLM_NODES", ",".join(node.url for node in cluster))
    monkeypatch.setenv("HYDRA_LLM_VRAM_MONITORING", "false")
    register_provider()
    register_provider()
    assert handler._transports is None

    assert chat(PLAIN, max_tokens=2).choices[0].message.content
    with handler.router as router:
        assert len(router.nodes()) == 2
    assert [item["custom_handler"] for item in litellm.custom_provider_map] == [handler]


def test_litellms_router_takes_it_as_one_deployment(cluster: SimulatedCluster) -> None:
    model = {"model_name": "small", "litellm_params": {"model": f"hydra/{PLAIN}"}}
    outer = litellm.Router(model_list=[model])
    cluster["a"].inject(ResetFault())
    answer = outer.completion(
        model="small", messages=HELLO, max_tokens=2, metadata={"hydra": {"node_id": "a"}}
    )

    assert decision(answer)["selected_node"] == "b"
    assert "hydra" not in json.dumps(sent(cluster))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_logged_after_the_last_test() -> Iterator[None]:
    """Let LiteLLM's threads finish what they log before the interpreter goes."""
    yield
    executor.submit(lambda: None).result(timeout=10)
