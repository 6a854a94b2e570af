"""Feature by feature: what ChatHydra sends, and what it returns, beside ChatOllama."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from ollama._types import Logprob
from pydantic import BaseModel
from typing_extensions import TypedDict

from hydra_llm.integrations.langchain import ChatHydra
from hydra_llm.testing import SimulatedNode
from tests.langchain.conftest import CHAT, EMBEDDING, OTHER, make_nodes

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
HISTORY = [
    SystemMessage("You are terse."),
    HumanMessage("My name is Ada."),
    AIMessage("Hello Ada."),
    HumanMessage("What is my name?"),
]


@tool
def get_weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"{city} {days}"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


class PersonDict(TypedDict):
    """A person."""

    name: str
    age: int


CALLED = AIMessage(
    "",
    tool_calls=[{"name": "get_weather", "args": {"city": "Paris"}, "id": "1", "type": "tool_call"}],
)
SAID_V1 = AIMessage(
    [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Hello"}],
    response_metadata={"output_version": "v1", "model_provider": "ollama"},
)


@dataclass(frozen=True)
class Feature:
    """One thing that ChatOllama can do."""

    name: str
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the constructor."""
    asked: Any = "Why is the sky blue?"
    said: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the call."""
    made: Callable[[Any], Any] = lambda model: model
    """What is made of the model before it is called."""

    def __str__(self) -> str:
        return self.name


def image(part: dict[str, Any]) -> list[BaseMessage]:
    return [HumanMessage([{"type": "text", "text": "What is this?"}, part])]


OPTIONS: dict[str, Any] = {
    "mirostat": 1, "mirostat_eta": 0.2, "mirostat_tau": 4.0, "num_ctx": 4096, "num_gpu": 99,
    "num_thread": 4, "num_predict": 9, "repeat_last_n": 32, "repeat_penalty": 1.2,
    "temperature": 0.3, "seed": 7, "stop": ["zzz"], "tfs_z": 1.0, "top_k": 20, "top_p": 0.8,
}  # fmt: skip
SCHEMA = Person.model_json_schema()
ASKED_FOR_JSON = "Return JSON with 'name' and 'age' keys."

FEATURES = [
    Feature("text"),
    Feature("messages", asked=HISTORY),
    Feature("tuples", asked=[("system", "You are terse."), ("human", "Hello")]),
    Feature("any role", asked=[ChatMessage(content="x", role="control"), HumanMessage("Hi")]),
    Feature("names", asked=[HumanMessage("Hi", name="ada")]),
    Feature("text in parts", asked=[HumanMessage(["one", {"type": "text", "text": "two"}])]),
    *(Feature(f"option {name}", given={name: value}) for name, value in OPTIONS.items()),
    Feature("all options", given=OPTIONS),
    Feature("options in the call", given={"seed": 7}, said={"options": {"num_predict": 3}}),
    Feature("stop in the call", said={"stop": ["the"]}),
    Feature("another model in the call", said={"model": OTHER}),
    Feature("keep_alive", given={"keep_alive": "10m"}),
    Feature("keep_alive in the call", said={"keep_alive": -1}),
    Feature("reasoning", given={"reasoning": True}),
    Feature("reasoning off", given={"reasoning": False}),
    Feature("reasoning in the call", said={"reasoning": True}),
    Feature("reasoning effort", given={"reasoning": "high"}),
    Feature("thoughts sent back", asked=[
        HumanMessage("Hi"), AIMessage("Hello", additional_kwargs={"reasoning_content": "hm"}),
        HumanMessage("So?"),
    ]),
    Feature("format json", given={"format": "json"}, asked=ASKED_FOR_JSON),
    Feature("format schema", given={"format": SCHEMA}),
    Feature("format in the call", said={"format": "json"}),
    Feature("response_format json_object", said={"response_format": {"type": "json_object"}}),
    Feature("response_format json_schema", said={
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    }),
    Feature("strict is dropped", said={"strict": True}),
    Feature("logprobs", given={"logprobs": True}),
    Feature("top_logprobs", given={"logprobs": True, "top_logprobs": 2}),
    Feature("image as URL", asked=image({"type": "image_url", "image_url": PNG})),
    Feature("image as data URI", asked=image({
        "type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}
    })),
    Feature("image block", asked=image({
        "type": "image", "source_type": "base64", "mime_type": "image/png", "data": PNG
    })),
    Feature("image block v1", asked=image({
        "type": "image", "base64": PNG, "mime_type": "image/png"
    })),
    Feature("tools", made=lambda m: m.bind_tools([get_weather]), asked="Weather in Paris, 3 days?"),
    Feature("tool_choice", made=lambda m: m.bind_tools([get_weather], tool_choice="any")),
    Feature("tools, then an answer", made=lambda m: m.bind_tools([get_weather]), asked=[
        HumanMessage("Weather in Paris?"), CALLED, ToolMessage("sunny", tool_call_id="1"),
    ]),
    Feature("structured output", made=lambda m: m.with_structured_output(Person)),
    Feature("structured output, typed dict", made=lambda m: m.with_structured_output(PersonDict)),
    Feature("structured output, JSON schema", made=lambda m: m.with_structured_output(SCHEMA)),
    Feature("structured output by a tool",
            made=lambda m: m.with_structured_output(Person, method="function_calling")),
    Feature("structured output by JSON mode", asked=ASKED_FOR_JSON,
            made=lambda m: m.with_structured_output(None, method="json_mode")),
    Feature("structured output, raw too",
            made=lambda m: m.with_structured_output(Person, include_raw=True)),
    Feature("v1 messages", given={"output_version": "v1"}),
    Feature("v1 messages with reasoning", given={"output_version": "v1", "reasoning": True}),
    Feature("v1 messages sent back", asked=[HumanMessage("Hi"), SAID_V1, HumanMessage("So?")]),
    Feature("not streamed", said={"stream": False}),
    Feature("streaming disabled", given={"disable_streaming": True}),
    Feature("bound", made=lambda m: m.bind(stop=["the"])),
    Feature("configured", asked="Hi", made=lambda m: m.configurable_fields(
        temperature=ConfigurableField("heat")).with_config(configurable={"heat": 0.1})),
    Feature("in a chain", asked={"topic": "rain"}, made=lambda m: (
        ChatPromptTemplate.from_messages([("human", "Tell me about {topic}")])
        | m | StrOutputParser())),
    Feature("with a fallback", made=lambda m: RunnableLambda(raising).with_fallbacks([m])),
    Feature("empty messages", asked=[]),
    # What goes wrong, goes wrong alike.
    Feature("stop twice", given={"stop": ["a"]}, said={"stop": ["b"]}),
    Feature("an unknown keyword", said={"nonsense": 1}),
    Feature("an unknown model", said={"model": "nobody/has:it"}),
    Feature("tools for a model without", given={"model": EMBEDDING}),
    Feature("audio", asked=image({"type": "audio", "base64": PNG, "mime_type": "audio/wav"})),
    Feature("an unknown method", made=lambda m: m.with_structured_output(Person, method="x")),
    Feature("an unknown schema argument", made=lambda m: m.with_structured_output(Person, huh=1)),
]  # fmt: skip


def raising(_: Any) -> Any:
    raise ValueError("no")


# --------------------------------------------------------------- what can be seen

# The one documented difference in what is sent: a loaded runner's own num_ctx, so that Ollama
# does not restart it.
RUNNERS_CONTEXT = {CHAT: 4096, OTHER: 4096, EMBEDDING: 2048}
TIMES = ("created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def plain(value: Any) -> Any:
    """What a caller sees, without what differs between any two calls."""
    if isinstance(value, BaseMessage):
        kind = "AIMessageChunk" if isinstance(value, AIMessageChunk) else value.type
        return {"kind": kind, **plain(value.model_dump(exclude={"id"}))}
    if isinstance(value, Logprob):
        # ChatOllama has ollama's objects here, ChatHydra plain data; both are read by key.
        return plain(value.model_dump())
    if isinstance(value, BaseModel):
        return {"kind": type(value).__name__, **plain(dict(value))}
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if k not in (*TIMES, "routing_decision")}
        if "logprob" in kept:  # ollama's type does not know them all
            kept = {k: v for k, v in kept.items() if k in Logprob.model_fields and v is not None}
        # The ids of tool calls and runs are drawn.
        return {k: "drawn" if k in ("id", "lc_run_id") else plain(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Exception):
        name = type(value).__name__
        is_text_theirs = name in ("ValueError", "ResponseError") and "not found" not in str(value)
        return ALSO.get(name, name), str(value) if is_text_theirs else ""
    return value


# Errors of ours, and which of ChatOllama's each is too.
ALSO = {"NoNodeHasModelError": "ResponseError", "RoutingWordError": "TypeError"}


def asked_of(node: SimulatedNode, since: int) -> list[Any]:
    """The bodies that a door sent."""
    bodies = []
    for record in node.requests[since:]:
        if record.headers.get("user-agent") == "hydra-llm" or record.path == "/api/show":
            continue
        body = json.loads(json.dumps(record.body))
        options = body.get("options") or {}
        if options.get("num_ctx") == RUNNERS_CONTEXT.get(body.get("model")):
            options.pop("num_ctx", None)
        if not options:
            body.pop("options", None)
        bodies.append((record.method, record.path, body))
    return bodies


class Tokens(BaseCallbackHandler):
    """What callbacks are told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.seen.append(token)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.seen.append(plain(response.generations[0][0].message))

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.seen.append(plain(error)[0])


VERBS = ("invoke", "stream", "batch")


def together(seen: list[Any]) -> int:
    """How many calls a batch has: of two that fail, the second may have begun or not."""
    return 1 if isinstance(seen[0]["answer"], tuple) else 2


def told(verb: str, answer: Any, tokens: Tokens) -> dict[str, Any]:
    return {"verb": verb, "answer": plain(answer), "tokens": tokens.seen}


def calls_of(feature: Feature) -> Iterator[tuple[str, Tokens, dict[str, Any]]]:
    for verb in VERBS:
        tokens = Tokens()
        config = {"callbacks": [tokens], "max_concurrency": 1}
        yield verb, tokens, {"config": config, **feature.said}


def seen_of(feature: Feature, model: Any) -> list[Any]:
    seen: list[Any] = []
    for verb, tokens, said in calls_of(feature):
        try:
            runnable = feature.made(model)
            if verb == "invoke":
                answer = runnable.invoke(feature.asked, **said)
            elif verb == "batch":
                answer = runnable.batch([feature.asked] * together(seen), **said)
            else:
                answer = list(runnable.stream(feature.asked, **said))
        except Exception as error:  # which one is what is compared
            answer = error
        seen.append(told(verb, answer, tokens))
    return seen


async def aseen_of(feature: Feature, model: Any) -> list[Any]:
    seen: list[Any] = []
    for verb, tokens, said in calls_of(feature):
        try:
            runnable = feature.made(model)
            if verb == "invoke":
                answer = await runnable.ainvoke(feature.asked, **said)
            elif verb == "batch":
                answer = await runnable.abatch([feature.asked] * together(seen), **said)
            else:
                answer = [part async for part in runnable.astream(feature.asked, **said)]
        except Exception as error:  # which one is what is compared
            answer = error
        seen.append(told(verb, answer, tokens))
    if not isinstance(model, ChatHydra):  # nobody else closes its connections
        await model._async_client._client.aclose()
    return seen


def observed(
    feature: Feature, kind: Any, node: SimulatedNode, *, is_async: bool
) -> tuple[Any, list[Any]]:
    """What a caller sees of a feature, and what the node was asked."""
    begin = len(node.requests)
    try:
        model = kind(**{"model": CHAT, "base_url": node.url, **feature.given})
        seen = asyncio.run(aseen_of(feature, model)) if is_async else seen_of(feature, model)
        if not isinstance(model, ChatHydra):
            model._client._client.close()
    except ValueError as error:
        seen = [plain(error)]
    return seen, asked_of(node, begin)


@pytest.fixture(scope="module")
def node() -> Iterator[SimulatedNode]:
    [node] = make_nodes("a", num_parallel=2)
    with node:
        for model in (CHAT, OTHER, EMBEDDING):
            node.preload(model, num_ctx=RUNNERS_CONTEXT[model])
        yield node


@pytest.fixture
def swept() -> Iterator[None]:
    """ChatOllama's connections are left to the garbage collector: have it come within the test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("swept")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_what_is_sent_and_what_comes_back(
    feature: Feature, is_async: bool, node: SimulatedNode
) -> None:
    theirs, theirs_asked = observed(feature, ChatOllama, node, is_async=is_async)
    ours, ours_asked = observed(feature, ChatHydra, node, is_async=is_async)

    assert ours == theirs
    if feature.name == "an unknown model":
        assert not ours_asked  # nobody has it, so nobody is asked
        return
    assert ours_asked == theirs_asked


def test_the_matrix_sees_answers_errors_and_requests(node: SimulatedNode) -> None:
    def seen(name: str) -> tuple[Any, list[Any]]:
        [feature] = [one for one in FEATURES if one.name == name]
        return observed(feature, ChatHydra, node, is_async=False)

    text, asked = seen("text")
    assert text[0]["answer"]["content"]
    assert len(text[1]["answer"]) > 5
    assert len(asked) == 4
    assert seen("option seed")[1] != asked
    assert seen("reasoning")[0][0]["answer"]["additional_kwargs"]["reasoning_content"]
    assert seen("tools")[0][0]["answer"]["tool_calls"][0]["args"] == {"city": "Paris", "days": 3}
    assert seen("stop twice")[0][0]["answer"][0] == "ValueError"
