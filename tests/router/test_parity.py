"""Four doors and ollama's own clients: the same call has the same end through each of them."""

from __future__ import annotations

import asyncio
import inspect
import re
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from pydantic import BaseModel

from hydra_llm import (
    AsyncClient,
    AsyncHydraTransport,
    Client,
    HydraTransport,
    Router,
    RoutingDecision,
)
from hydra_llm.client import RESTART_OF, VERBS
from hydra_llm.testing import (
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    HtmlFault,
    MissingModelFault,
    RequestRecord,
    ResetFault,
    SimulatedCluster,
    SimulatedNode,
    StatusFault,
    TokenFault,
)
from hydra_llm.words import WORDS, RoutingWords
from tests.router.conftest import MODEL, make_nodes, make_router

EMBEDDING = "nomic-embed-text"
MODELS = (MODEL, "qwen3:8b", EMBEDDING)
# So fast that five minutes of idling are over in no time: nothing is ever unloaded.
WORLD: dict[str, Any] = {"models": MODELS, "speed": 2000.0, "keep_alive_s": 1e9}
HELLO = [{"role": "user", "content": "Tell me about lighthouses."}]
SHORT: dict[str, Any] = {"num_predict": 8}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}

# ------------------------------------------------------------------ what can be seen

_CLOCKS = ("created_at", "modified_at", "expires_at", "total_duration", "load_duration",
           "prompt_eval_duration", "eval_duration", "date", "created")  # fmt: skip
_NUMBERS = re.compile(r"\d+(\.\d+)?(?= (s|ms)\b)|(?<=127\.0\.0\.1:)\d+")


def timeless(value: Any) -> Any:
    """Without what differs between any two runs: times and ports."""
    if isinstance(value, RoutingDecision):
        shown = value.to_dict()
        kept = ("model", "requested_node", "selected_node", "rejections")
        outcomes = [attempt["outcome"] for attempt in shown["attempts"]]
        return {**{key: timeless(shown[key]) for key in kept}, "outcomes": outcomes}
    if isinstance(value, (BaseModel, Mapping)):
        items = dict(value).items()
        return {key: timeless(item) for key, item in items if key not in _CLOCKS}
    if isinstance(value, (list, tuple)):
        return [timeless(item) for item in value]
    if isinstance(value, str):
        return _NUMBERS.sub("N", value)
    return value


def requests_of(node: SimulatedNode) -> list[tuple[Any, ...]]:
    """What it was asked by a door, not by the collector; ``client left`` may come late."""
    return sorted(
        (r.method, r.path, repr(r.body), sorted(r.headers), r.status)
        for r in node.requests
        if r.headers.get("user-agent") != "hydra-llm"
    )


@dataclass
class Seen:
    """All that a caller and the nodes could tell of one call."""

    answer: list[Any] = field(default_factory=list)
    error: tuple[str, str] | None = None
    requests: dict[str, Any] = field(default_factory=dict)

    def note(self, part: Any) -> None:
        self.answer.append((type(part).__name__, timeless(part)))

    def note_error(self, error: Exception) -> None:
        self.error = (type(error).__name__, timeless(str(error)))


# ------------------------------------------------------------------------- scenarios


def nothing(cluster: SimulatedCluster) -> None:
    pass


def all_fail(cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.inject(StatusFault(status=500))


def all_die(cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.kill()


def a_has(fault: Any) -> Callable[[SimulatedCluster], None]:
    return lambda cluster: cluster["a"].inject(fault)


@dataclass(frozen=True)
class Scenario:
    """One call, and what is wrong with the nodes."""

    name: str
    verb: str
    arguments: Mapping[str, Any]
    error: str | None = None
    arrange: Callable[[SimulatedCluster], None] = nothing

    def __str__(self) -> str:
        return self.name


CHAT = {"model": MODEL, "messages": HELLO, "options": SHORT}
GENERATE = {"model": MODEL, "prompt": "Hi", "options": SHORT}
STREAM = {**CHAT, "stream": True}

SCENARIOS = [
    Scenario("chat", "chat", CHAT),
    Scenario("chat stream", "chat", STREAM),
    Scenario("chat pinned", "chat", {**CHAT, "node_id": "c"}),
    Scenario("chat with a tool", "chat", {**CHAT, "model": "qwen3:8b", "tools": [TOOL]}),
    Scenario("chat with thinking", "chat", {**CHAT, "model": "qwen3:8b", "think": True}),
    Scenario("chat with a schema", "chat", {**CHAT, "format": SCHEMA}),
    Scenario("chat that loads", "chat", {**CHAT, "messages": []}),
    Scenario("chat that unloads", "chat", {**CHAT, "messages": [], "keep_alive": 0}),
    Scenario("generate", "generate", GENERATE),
    Scenario("generate stream", "generate", {**GENERATE, "stream": True}),
    Scenario("generate with a suffix", "generate", {**GENERATE, "suffix": "end"}),
    Scenario("embed", "embed", {"model": EMBEDDING, "input": "Hello"}),
    Scenario("embed batch", "embed", {"model": EMBEDDING, "input": ["Hello", "there"]}),
    Scenario("embeddings", "embeddings", {"model": EMBEDDING, "prompt": "Hello"}),
    Scenario("list", "list", {}),
    Scenario("list of one", "list", {"node_id": "b"}),
    Scenario("ps", "ps", {}),
    Scenario("show", "show", {"model": MODEL}),
    Scenario("show of nothing", "show", {"model": "nope"}, "ResponseError"),
    Scenario("pull", "pull", {"model": MODEL, "node_id": "b"}),
    Scenario("pull stream", "pull", {"model": MODEL, "node_id": "b", "stream": True}),
    Scenario("pull of nothing", "pull", {"model": "nope", "node_id": "b"}, "ResponseError"),
    Scenario("copy", "copy", {"source": MODEL, "destination": "mine", "node_id": "b"}),
    Scenario("delete", "delete", {"model": MODEL, "node_id": "c"}),
    Scenario("delete nowhere", "delete", {"model": MODEL}, "ConfigurationError"),
    Scenario("create", "create", {"model": "x", "from_": MODEL, "node_id": "a"}, "ResponseError"),
    Scenario("no such node", "pull", {"model": MODEL, "node_id": "z"}, "ConfigurationError"),
    Scenario("no such model", "chat", {**CHAT, "model": "nope"}, "NoNodeHasModelError"),
    Scenario("no such model, stream", "chat", {**STREAM, "model": "nope"}, "NoNodeHasModelError"),
    Scenario("no model", "chat", {**CHAT, "model": ""}, "ValidationError"),
    Scenario("no such label", "chat", {**CHAT, "require_labels": "z"}, "NoEligibleNodeError"),
    Scenario("strict pin", "chat", {**CHAT, "node_id": "z", "pin": "require"},
             "NoEligibleNodeError"),
    Scenario("strict VRAM", "chat", {**CHAT, "min_vram_gb": 80, "vram": "require"},
             "NoEligibleNodeError"),
    Scenario("too soon", "chat", {**CHAT, "deadline_s": 0.001}, "DeadlineError"),
    Scenario("misspelt word", "chat", {**CHAT, "nod_id": "a"}, "RoutingWordError"),
    Scenario("wrong word", "chat", {**CHAT, "priority": 11}, "RoutingWordError"),
    Scenario("web search", "web_search", {"query": "x"}, "ConfigurationError"),
    Scenario("web fetch", "web_fetch", {"url": "http://x"}, "ConfigurationError"),
    Scenario("caller's mistake", "chat", {**CHAT, "keep_alive": "5 apples"}, "ResponseError"),
    Scenario("caller's mistake, stream", "chat", {**STREAM, "keep_alive": "5 apples"},
             "ResponseError"),
    Scenario("wrong option", "generate", {**GENERATE, "options": {"num_ctx": "big"}},
             "ResponseError"),
    Scenario("500", "chat", CHAT, None, a_has(StatusFault(status=500))),
    Scenario("500, stream", "chat", STREAM, None, a_has(StatusFault(status=500))),
    Scenario("503", "generate", GENERATE, None, a_has(StatusFault(status=503))),
    Scenario("401", "chat", CHAT, None, a_has(StatusFault(status=401))),
    Scenario("404", "chat", CHAT, None, a_has(MissingModelFault())),
    Scenario("web page", "chat", CHAT, None, a_has(HtmlFault())),
    Scenario("error body", "chat", CHAT, None, a_has(ErrorBodyFault())),
    Scenario("error line first", "chat", STREAM, None, a_has(ErrorLineFault(after=0))),
    Scenario("reset", "embed", {"model": EMBEDDING, "input": "x"}, None, a_has(ResetFault())),
    Scenario("dies while it answers", "chat", CHAT, None, a_has(TokenFault(after=3))),
    Scenario("error line", "chat", STREAM, "StreamBrokenError", a_has(ErrorLineFault(after=3))),
    Scenario("cut", "chat", STREAM, "StreamBrokenError", a_has(CutFault(after=3))),
    Scenario("reset later", "chat", STREAM, "StreamBrokenError", a_has(ResetFault(after=3))),
    Scenario("dies later", "generate", {**GENERATE, "stream": True}, "StreamBrokenError",
             a_has(TokenFault(after=3))),
    Scenario("all fail", "chat", CHAT, "AllNodesFailedError", all_fail),
    Scenario("all fail, stream", "chat", STREAM, "AllNodesFailedError", all_fail),
    Scenario("all dead", "chat", CHAT, "NoNodeUpError", all_die),
    Scenario("all dead, list", "list", {}, "NoNodeUpError", all_die),
]  # fmt: skip


def small_world() -> SimulatedCluster:
    """Node a before b before c, so that there is never a draw; the model is loaded on all."""
    cluster = SimulatedCluster(make_nodes("a", "b", "c", **WORLD))
    for node in cluster.node_list:
        node.preload(MODEL)
    return cluster


def router_over(cluster: SimulatedCluster) -> Router:
    labels = {"a": ("near", "quiet"), "b": ("near",), "c": ()}
    nodes = [node.node(labels=labels[node.id]) for node in cluster]
    # Reading the authorities for TLS would be half of the time that these tests take.
    settings = {"health_check_interval": 60.0, "random_seed": 1, "verify": False}
    router = make_router(cluster, nodes=nodes, **settings)
    while any(node.health == "unknown" for node in router.nodes()):
        time.sleep(0.001)  # on a busy machine one may be seen later than the others
    return router


PREFER: dict[str, Any] = {"prefer_labels": ("near", "quiet")}


def through_client(scenario: Scenario) -> Seen:
    seen = Seen()
    with small_world() as cluster:
        scenario.arrange(cluster)
        with router_over(cluster) as router, Client(router=router, **PREFER) as client:
            try:
                answer = getattr(client, scenario.verb)(**scenario.arguments)
                if scenario.arguments.get("stream"):
                    for part in answer:
                        seen.note(part)
                else:
                    seen.note(answer)
            except Exception as error:
                seen.note_error(error)
            assert (router.in_flight, router.waiting) == (0, 0)
        seen.requests = {node.id: requests_of(node) for node in cluster}
    return seen


async def through_async_client(scenario: Scenario) -> Seen:
    seen = Seen()
    with small_world() as cluster:
        scenario.arrange(cluster)
        async with router_over(cluster) as router, AsyncClient(router=router, **PREFER) as client:
            try:
                answer = await getattr(client, scenario.verb)(**scenario.arguments)
                if scenario.arguments.get("stream"):
                    async for part in answer:
                        seen.note(part)
                else:
                    seen.note(answer)
            except Exception as error:
                seen.note_error(error)
            assert (router.in_flight, router.waiting) == (0, 0)
        seen.requests = {node.id: requests_of(node) for node in cluster}
    return seen


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_both_clients_have_the_same_end_and_ask_the_same(scenario: Scenario) -> None:
    sync = through_client(scenario)
    aio = asyncio.run(through_async_client(scenario))

    assert (sync.error[0] if sync.error else None) == scenario.error
    assert aio.error == sync.error
    assert aio.answer == sync.answer
    assert aio.requests == sync.requests
    assert sync.error or sync.answer


def test_no_two_scenarios_have_one_name_and_every_verb_has_one() -> None:
    names = [scenario.name for scenario in SCENARIOS]

    assert len(set(names)) == len(names)
    not_simulated = {"push", "create_blob", "systemone"}
    assert {s.verb for s in SCENARIOS} == set(VERBS) - not_simulated | {"web_search", "web_fetch"}


# ------------------------------------------------------------------------ transports


@dataclass(frozen=True)
class Post:
    """One HTTP request, and what is wrong with the nodes."""

    name: str
    path: str
    body: Any
    status: int | None = 200
    error: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    arrange: Callable[[SimulatedCluster], None] = nothing
    method: str = "POST"

    def __str__(self) -> str:
        return self.name


V1 = {"model": MODEL, "messages": HELLO, "max_tokens": 8}
V1_STREAM = {**V1, "stream": True}
EVERY_WORD = {
    "x-hydra-node-id": "b",
    "x-hydra-min-vram-gb": "1",
    "x-hydra-prefer-local": "false",
    "x-hydra-priority": "9",
    "x-hydra-session": "s",
    "x-hydra-exclude-nodes": "c",
    "x-hydra-require-labels": "near",
    "x-hydra-prefer-labels": "near,quiet",
    "x-hydra-deadline-s": "60",
    "x-hydra-pin": "require",
    "x-hydra-vram": "prefer",
}
SENT = {"Authorization": "Bearer sk-mine", "X-Request-Id": "7", "Accept-Encoding": "gzip"}

POSTS = [
    Post("native", "/api/chat", {**CHAT, "stream": False}),
    Post("native stream", "/api/chat", CHAT),
    Post("OpenAI", "/v1/chat/completions", V1),
    Post("OpenAI stream", "/v1/chat/completions", V1_STREAM),
    Post("OpenAI text", "/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 8}),
    Post("OpenAI embeddings", "/v1/embeddings", {"model": EMBEDDING, "input": "Hi"}),
    Post("OpenAI models", "/v1/models", None, method="GET"),
    Post("Anthropic", "/v1/messages", V1),
    Post("Anthropic stream", "/v1/messages", V1_STREAM),
    Post("responses", "/v1/responses", {"model": MODEL, "input": "Hi"}),
    Post("responses stream", "/v1/responses", {"model": MODEL, "input": "Hi", "stream": True}),
    Post("every word", "/api/chat", CHAT, headers={**EVERY_WORD, **SENT}),
    Post("misspelt", "/api/chat", CHAT, None, "RoutingWordError", {"x-hydra-nod-id": "a"}),
    Post("a wrong word", "/api/chat", CHAT, None, "RoutingWordError", {"x-hydra-priority": "x"}),
    Post("version", "/api/version", None, method="GET"),
    Post("root", "/", None, method="GET"),
    Post("tags", "/api/tags", None, method="GET"),
    Post("one node's ps", "/api/ps", None, headers={"x-hydra-node-id": "b"}, method="GET"),
    Post("nowhere", "/nothing/here", {}, None, "ConfigurationError"),
    Post("nowhere on a", "/nothing/here", {}, 404, headers={"x-hydra-node-id": "a"}),
    Post("no JSON", "/api/chat", b"{", 400),
    Post("a list", "/api/chat", [], 400),
    Post("no model", "/api/chat", {}, 400),
    Post("options of a wrong type", "/api/chat", {**CHAT, "options": "abc"}, 400),
    Post("caller's mistake", "/api/chat", {**CHAT, "keep_alive": "5 apples"}, 400),
    Post("no such model", "/v1/chat/completions", {**V1, "model": "nope"}, None,
         "NoEligibleNodeError"),
    Post("500", "/v1/chat/completions", V1_STREAM, arrange=a_has(StatusFault(status=500))),
    Post("cut", "/v1/chat/completions", V1_STREAM, 200, "StreamBrokenError",
         arrange=a_has(CutFault(after=3))),
    Post("reset", "/v1/chat/completions", V1_STREAM, 200, "StreamBrokenError",
         arrange=a_has(ResetFault(after=3))),
    Post("all fail", "/v1/chat/completions", V1, None, "AllNodesFailedError", arrange=all_fail),
]  # fmt: skip

_UNLIKE = re.compile(
    rb'"(created_at|modified_at|expires_at)": ?"[^"]*"|"(\w+_duration|created|\w+_at)": ?\d+'
    rb'|"(id|item_id|response_id)": ?"[^"]*"'
)


def answered(seen: Seen, response: httpx.Response) -> None:
    unlike = {"date", "content-length"}
    kept = sorted((k, v) for k, v in response.headers.items() if k not in unlike)
    seen.answer.append((response.status_code, kept))


def request_of(post: Post, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
    body: dict[str, Any] = {"json": post.body}
    if post.body is None or isinstance(post.body, bytes):
        body = {"content": post.body}
    return client.build_request(post.method, post.path, headers=post.headers, **body)


def through_transport(post: Post) -> Seen:
    seen = Seen()
    with small_world() as cluster:
        post.arrange(cluster)
        with (
            router_over(cluster) as router,
            httpx.Client(
                base_url="http://hydra", transport=HydraTransport(router=router, **PREFER)
            ) as client,
        ):
            received = b""
            try:
                response = client.send(request_of(post, client), stream=True)
                answered(seen, response)
                for data in response.iter_bytes():
                    received += data
                response.close()
            except Exception as error:
                seen.note_error(error)
            seen.answer.append(_UNLIKE.sub(b"-", received))
            assert (router.in_flight, router.waiting) == (0, 0)
        seen.requests = {node.id: requests_of(node) for node in cluster}
    return seen


async def through_async_transport(post: Post) -> Seen:
    seen = Seen()
    with small_world() as cluster:
        post.arrange(cluster)
        async with (
            router_over(cluster) as router,
            httpx.AsyncClient(
                base_url="http://hydra", transport=AsyncHydraTransport(router=router, **PREFER)
            ) as client,
        ):
            received = b""
            try:
                response = await client.send(request_of(post, client), stream=True)
                answered(seen, response)
                async for data in response.aiter_bytes():
                    received += data
                await response.aclose()
            except Exception as error:
                seen.note_error(error)
            seen.answer.append(_UNLIKE.sub(b"-", received))
            assert (router.in_flight, router.waiting) == (0, 0)
        seen.requests = {node.id: requests_of(node) for node in cluster}
    return seen


@pytest.mark.parametrize("post", POSTS, ids=str)
def test_both_transports_have_the_same_end_and_ask_the_same(post: Post) -> None:
    sync = through_transport(post)
    aio = asyncio.run(through_async_transport(post))

    assert (sync.error[0] if sync.error else None) == post.error
    if post.status is not None:
        assert sync.answer[0][0] == post.status
    assert aio == sync
    for requests in sync.requests.values():
        for *_, headers, _ in requests:
            assert not any(name.startswith("x-hydra") for name in headers)
            assert "authorization" not in headers


# --------------------------------------------------------------------------- drop-in

DROP_IN: list[tuple[str, dict[str, Any]]] = [
    ("chat", CHAT),
    ("chat", STREAM),
    ("chat", {**CHAT, "model": "qwen3:8b", "think": True, "stream": True}),
    ("chat", {**CHAT, "model": "qwen3:8b", "tools": [TOOL]}),
    ("chat", {**CHAT, "format": SCHEMA, "keep_alive": "1m"}),
    ("generate", GENERATE),
    ("generate", {**GENERATE, "stream": True, "system": "Be brief.", "raw": False}),
    ("embed", {"model": EMBEDDING, "input": ["Hello", "there"]}),
    ("embeddings", {"model": EMBEDDING, "prompt": "Hello"}),
    ("list", {}),
    ("ps", {}),
    ("show", {"model": MODEL}),
    ("pull", {"model": MODEL}),
    ("pull", {"model": MODEL, "stream": True}),
    ("copy", {"source": MODEL, "destination": "mine"}),
    ("delete", {"model": MODEL}),
    ("delete", {"model": "nope"}),
    ("create", {"model": "mine", "from_": MODEL}),
    ("chat", {**CHAT, "keep_alive": "5 apples"}),
    ("generate", {**GENERATE, "options": {"num_ctx": "big"}}),
]
ADMIN = {"pull", "push", "create", "create_blob", "copy", "delete"}
ROUTED = {"routing_decision", "node_id", "node_url", "continued_from", "hydra_node", "hydra_nodes"}


def as_ollama_gives(value: Any) -> Any:
    """Without times and without what is ours."""
    if isinstance(value, (BaseModel, Mapping)):
        items = dict(value).items()
        return {k: as_ollama_gives(v) for k, v in items if k not in ROUTED | set(_CLOCKS)}
    if isinstance(value, (list, tuple)):
        return [as_ollama_gives(item) for item in value]
    return value


def asked_by(client: Any, verb: str, arguments: Mapping[str, Any]) -> list[Any]:
    try:
        answer = getattr(client, verb)(**arguments)
        parts = list(answer) if arguments.get("stream") else [answer]
    except ollama.ResponseError as error:
        return [("error", error.error, error.status_code)]
    return [as_ollama_gives(part) for part in parts]


@pytest.mark.parametrize(("verb", "arguments"), DROP_IN)
def test_over_one_node_a_verb_gives_what_ollamas_own_client_gives(
    verb: str, arguments: dict[str, Any]
) -> None:
    def one_node() -> SimulatedCluster:
        return SimulatedCluster(make_nodes("a", **WORLD))

    with one_node() as cluster:
        with ollama.Client(cluster["a"].url) as theirs:
            expected = asked_by(theirs, verb, arguments)
        asked = [(r.method, r.path, r.body) for r in cluster["a"].requests]

    with one_node() as cluster:
        with router_over(cluster) as router, Client(router=router) as ours:
            where = {"node_id": "a"} if verb in ADMIN else {}
            given = asked_by(ours, verb, {**arguments, **where})
        records = [r for r in cluster["a"].requests if r.headers["user-agent"] != "hydra-llm"]

    assert given == expected
    assert [(r.method, r.path, r.body) for r in records] == asked
    assert sorted(records[0].headers) == sorted(_headers_of(records[0]))


def _headers_of(record: RequestRecord) -> set[str]:
    """What ollama's client sends; connection is ours to keep."""
    sent = {"host", "accept", "accept-encoding", "content-type", "user-agent"}
    return sent | ({"content-length"} if record.method != "GET" else set())


TYPES: list[tuple[str, dict[str, Any], type]] = [
    ("chat", CHAT, ollama.ChatResponse),
    ("generate", GENERATE, ollama.GenerateResponse),
    ("embed", {"model": EMBEDDING, "input": "x"}, ollama.EmbedResponse),
    ("embeddings", {"model": EMBEDDING, "prompt": "x"}, ollama.EmbeddingsResponse),
    ("list", {}, ollama.ListResponse),
    ("ps", {}, ollama.ProcessResponse),
    ("show", {"model": MODEL}, ollama.ShowResponse),
    ("pull", {"model": MODEL, "node_id": "a"}, ollama.ProgressResponse),
    ("copy", {"source": MODEL, "destination": "m", "node_id": "a"}, ollama.StatusResponse),
]


def test_what_comes_back_is_of_ollamas_types() -> None:
    with small_world() as cluster, router_over(cluster) as router, Client(router=router) as client:
        for verb, arguments, kind in TYPES:
            assert isinstance(getattr(client, verb)(**arguments), kind)
        for part in client.chat(**STREAM):
            assert isinstance(part, ollama.ChatResponse)
        assert isinstance(client, ollama.Client)
        assert isinstance(AsyncClient(router=router), ollama.AsyncClient)


def test_a_blob_is_uploaded_to_the_node_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100_000)

    async def aio(router: Router) -> None:
        await AsyncClient(router=router).create_blob(file, node_id="b")

    with small_world() as cluster, router_over(cluster) as router, Client(router=router) as client:
        # The simulated node takes no blobs; that it says so is enough.
        for upload in (
            lambda: client.create_blob(file, node_id="b"),
            lambda: asyncio.run(aio(router)),
        ):
            with pytest.raises(ollama.ResponseError) as caught:
                upload()
            assert caught.value.status_code == 404
        uploads = [r for r in cluster["b"].requests if r.path.startswith("/api/blobs/")]

    assert len(uploads) == 2


@pytest.mark.skipif(not hasattr(ollama.Client, "systemone"), reason="an ollama without it")
def test_a_verb_that_only_newer_clients_have_is_routed_like_any_other() -> None:
    questions = {"q": {"type": "noul", "instructions": "Is it?"}}

    async def aio(router: Router) -> None:
        await AsyncClient(router=router).systemone(MODEL, "x", questions, node_id="b")

    with small_world() as cluster, router_over(cluster) as router, Client(router=router) as client:
        for call in (
            lambda: client.systemone(MODEL, "x", questions, node_id="b"),
            lambda: asyncio.run(aio(router)),
        ):
            with pytest.raises(ollama.ResponseError, match="404"):  # of the simulated node
                call()
        assert [len(requests_of(node)) for node in cluster] == [0, 2, 0]


# -------------------------------------------------------------------------- contract


def public_verbs(client: type) -> set[str]:
    return {
        name
        for name, value in vars(client).items()
        if not name.startswith("_") and inspect.isfunction(value) and name != "close"
    }


CLIENTS = [(ollama.Client, Client), (ollama.AsyncClient, AsyncClient)]


@pytest.mark.parametrize(("theirs", "ours"), CLIENTS)
def test_every_verb_of_ollamas_is_ours_with_its_parameters_and_the_words(
    theirs: type, ours: type
) -> None:
    refused = {"web_search", "web_fetch"}
    assert public_verbs(theirs) - refused <= set(VERBS)
    for name in public_verbs(theirs) - refused:
        assert name in vars(ours), f"{name} is inherited, and takes no routing word"
        their_verb, our_verb = getattr(theirs, name), getattr(ours, name)
        expected = inspect.signature(their_verb)
        given = inspect.signature(our_verb)
        plain = [p for p in given.parameters.values() if p.name not in (*WORDS, RESTART_OF)]
        assert plain == list(expected.parameters.values())
        assert [p for p in given.parameters if p in WORDS] == list(WORDS)
        for word in WORDS:
            assert given.parameters[word].kind is inspect.Parameter.KEYWORD_ONLY
            assert given.parameters[word].annotation == RoutingWords.model_fields[word].annotation
        assert inspect.iscoroutinefunction(our_verb) == inspect.iscoroutinefunction(their_verb)
        assert not WORDS_OF_OURS & set(expected.parameters)
        assert our_verb.__doc__ == their_verb.__doc__


WORDS_OF_OURS = set(WORDS)


@pytest.mark.parametrize("theirs", [ollama.Client, ollama.AsyncClient])
def test_every_verb_of_the_installed_ollama_goes_through_the_seam_we_replace(theirs: type) -> None:
    for name in ("_request", "_request_raw"):
        parameters = inspect.signature(getattr(theirs, name)).parameters.values()
        assert any(p.kind is p.VAR_POSITIONAL for p in parameters)
        assert any(p.kind is p.VAR_KEYWORD for p in parameters)
    assert list(inspect.signature(theirs._request).parameters)[:2] == ["self", "cls"]  # type: ignore[attr-defined]
    assert "stream" in inspect.signature(theirs._request).parameters  # type: ignore[attr-defined]

    for name in public_verbs(theirs) & set(VERBS):
        source = textwrap.dedent(inspect.getsource(getattr(theirs, name)))
        assert re.search(r"self\._request(_raw)?\(", source), name
        # On anything else a call that is bound to its words would stumble.
        assert set(re.findall(r"self\.(\w+)", source)) <= {"_request", "_request_raw"}, name
