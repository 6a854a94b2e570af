"""What callers get for what a real Ollama sent, of two versions, through every door."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from vcr.errors import CannotOverwriteExistingCassetteException

from hydra_llm import (
    AllNodesFailedError,
    AsyncClient,
    AsyncHydraTransport,
    Client,
    HydraTransport,
    Router,
    StreamBrokenError,
)
from hydra_llm.exceptions import NoEligibleNodeError
from tests.wire.cassettes import NODE, VERSIONS, Recording, Tape, replayed

EACH_VERSION = pytest.mark.parametrize("version", VERSIONS)

VERBS: dict[str, tuple[str, Any]] = {
    "/api/chat": ("chat", ollama.ChatResponse),
    "/api/generate": ("generate", ollama.GenerateResponse),
    "/api/embed": ("embed", ollama.EmbedResponse),
    "/api/embeddings": ("embeddings", ollama.EmbeddingsResponse),
    "/api/show": ("show", ollama.ShowResponse),
    "/api/tags": ("list", ollama.ListResponse),
    "/api/ps": ("ps", ollama.ProcessResponse),
}

Ask = Callable[[Router, Recording, list[Any]], Any]
"""Makes a recorded call; what arrives is in the list, even if an error follows."""


def arguments_of(recording: Recording) -> dict[str, Any]:
    arguments = dict(recording.asked or {})
    if recording.path in ("/api/chat", "/api/generate"):
        arguments.setdefault("stream", True)
    return arguments


async def ask_sync(router: Router, recording: Recording, received: list[Any]) -> None:
    verb, _ = VERBS[recording.path]
    arguments = arguments_of(recording)
    with Client(router=router) as client:
        answer = getattr(client, verb)(**arguments)
        for part in answer if arguments.get("stream") else [answer]:
            received.append(part)  # noqa: PERF402  # what came before an error is kept


async def ask_async(router: Router, recording: Recording, received: list[Any]) -> None:
    verb, _ = VERBS[recording.path]
    arguments = arguments_of(recording)
    async with AsyncClient(router=router) as client:
        answer = await getattr(client, verb)(**arguments)
        if not arguments.get("stream"):
            received.append(answer)
            return
        async for part in answer:
            received.append(part)


EACH_CLIENT = pytest.mark.parametrize("ask", [ask_sync, ask_async], ids=["Client", "AsyncClient"])

OURS = {"routing_decision", "node_id", "node_url", "continued_from"}


def theirs(answer: Any) -> Any:
    """An answer without what is ours."""
    return answer.model_dump(exclude=OURS)


# --------------------------------------------------------------------------- answers

ANSWERS = (
    "chat-nonstream chat-stream chat-stop-eos-stream chat-toolcall-nonstream "
    "chat-toolcall-stream chat-toolcall-truncated chat-think-true-nonstream "
    "chat-think-true-stream chat-think-false chat-format-json chat-format-schema "
    "chat-format-schema-stream chat-logprobs chat-stream-num_ctx chat-empty-messages-load "
    "chat-unload generate-nonstream generate-stream generate-think-stream "
    "generate-raw-nonstream generate-load-cold generate-unload embed-single embed-batch "
    "embed-too-long-truncated embeddings-legacy"
).split()


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_is_what_ollama_sent_and_who_sent_it(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    documents = [json.loads(line) for line in recording.lines] or [recording.document]
    _, kind = VERBS[recording.path]
    received: list[Any] = []

    with replayed(Tape(version, name), folder=tmp_path) as router:
        await ask(router, recording, received)

    assert [theirs(part) for part in received] == [kind(**d).model_dump() for d in documents]
    assert all(isinstance(part, kind) for part in received)
    last = received[-1]
    assert (last.node_id, last.node_url) == (NODE.id, NODE.url)
    assert all(part.routing_decision is None for part in received[:-1])
    decision = last.routing_decision
    assert [attempt.outcome for attempt in decision.attempts] == ["ok"]
    for fact, field in (("prompt_tokens", "prompt_eval_count"), ("output_tokens", "eval_count")):
        assert decision.actual.get(fact) == documents[-1].get(field)
    if "load_duration" in documents[-1]:
        assert decision.actual["load"] == documents[-1]["load_duration"] / 1e9


LISTINGS = ["show-rand-tiny", "show-rand-embed"]


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", LISTINGS)
async def test_what_a_node_tells_of_a_model_is_handed_on(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    received: list[Any] = []

    with replayed(Tape(version, name), folder=tmp_path) as router:
        await ask(router, recording, received)

    assert received == [ollama.ShowResponse(**recording.document)]


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", ["tags", "ps-one"])
async def test_a_catalogue_of_one_node_is_that_nodes(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    received: list[Any] = []

    # It is on the tape once for the collector, and once for the caller.
    with replayed(Tape(version, name), folder=tmp_path) as router:
        await ask(router, recording, received)

    _, kind = VERBS[recording.path]
    assert theirs(received[0]) == theirs(kind(**recording.document))


@EACH_VERSION
def test_the_first_look_at_a_node_is_all_that_a_decision_needs(
    version: str, tmp_path: Path
) -> None:
    with replayed(Tape(version, ps="ps-one"), folder=tmp_path) as router:
        (node,) = router.nodes()
        decision = router.explain("rand-tiny")

        assert (node.health, node.version) == ("up", version)
        assert list(node.loaded) == ["rand-tiny:latest"]
        assert "rand-embed:latest" in node.installed
        assert decision.selected_node == NODE.id
        assert "loaded" in decision.reason


# ---------------------------------------------------------------------------- errors

CALLERS_FAULT = {
    "err-keep-alive-bad": (400, "time: unknown unit"),
    "chat-think-bad-value": (400, "invalid think value"),
    "chat-embedding-model": (400, "does not support chat"),
    "generate-embedding-model": (400, "does not support generate"),
    "embed-too-long-truncate-false": (400, "the input length exceeds the context length"),
    "err-option-wrong-type": (500, 'option "num_ctx" must be of type integer'),
    "err-unknown-model-show": (404, "not found"),
    "err-bad-model-name": (400, "invalid model name"),
}


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", CALLERS_FAULT)
async def test_a_mistake_of_the_callers_comes_back_as_ollama_tells_it(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    asked = str(recording.asked.get("model"))

    with replayed(Tape(version, name, deleted=(asked,)), folder=tmp_path) as router:
        with pytest.raises(ollama.ResponseError) as caught:
            await ask(router, recording, [])
        (node,) = router.nodes()

    status, text = CALLERS_FAULT[name]
    assert caught.value.status_code == status == recording.status
    assert text in caught.value.error
    assert json.loads(recording.content)["error"] == caught.value.error
    assert (node.circuit, node.penalty_seconds) == ("closed", 0.0)


NODES_FAULT = {
    "err-unknown-model-chat": "model_not_found",
    "err-unknown-model-generate": "model_not_found",
    "err-unknown-model-embed": "model_not_found",
    "err-memory-huge-num_ctx": "load_failed",
    "err-memory-huge-num_ctx-stream": "load_failed",
    "err-queue-full-chat": "busy",
    "err-queue-full-generate": "busy",
    "err-queue-full-embed": "busy",
    "runner-sigkill-before-first-token": "error_response",
    "runner-sigkill-nonstream": "error_response",
    "runner-sigkill-while-loading": "load_failed",
    "server-sigkill-nonstream": "reset",
    "server-sigterm-nonstream": "reset",
    "token-repeat-abort-nonstream": "stream_broken",
}


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", NODES_FAULT)
async def test_a_fault_of_the_nodes_is_told_as_what_it_is(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    deleted = ("no-such-model",) if "unknown-model" in name else ()
    received: list[Any] = []

    with replayed(Tape(version, name, deleted=deleted), folder=tmp_path) as router:
        with pytest.raises(AllNodesFailedError) as caught:
            await ask(router, recording, received)

    assert [attempt.outcome for attempt in caught.value.attempts] == [NODES_FAULT[name]]
    assert [attempt.node_id for attempt in caught.value.attempts] == [NODE.id]
    assert caught.value.attempts[0].status_code in (recording.status, None)
    assert received == []
    assert "\n" not in str(caught.value)
    assert "Hello" not in str(caught.value)


@EACH_CLIENT
async def test_what_no_node_has_is_asked_of_none(ask: Ask, tmp_path: Path) -> None:
    recording = Recording("0.32.15", "err-unknown-model-chat")

    with replayed(Tape("0.32.15"), folder=tmp_path) as router:
        with pytest.raises(NoEligibleNodeError) as caught:
            await ask(router, recording, [])

    assert isinstance(caught.value, ollama.ResponseError)
    assert caught.value.status_code == 404


BROKEN = {
    "runner-sigkill-midstream": "put an error|an error inside its answer",
    "runner-sigkill-generate-midstream": "an error inside its answer",
    "server-sigkill-midstream": "broke the connection",
    "server-sigterm-midstream": "broke the connection",
    "token-repeat-abort-stream": "without being complete",
    "token-repeat-abort-generate": "without being complete",
}


@EACH_VERSION
@EACH_CLIENT
@pytest.mark.parametrize("name", BROKEN)
async def test_a_stream_that_breaks_gives_what_came_and_says_so(
    name: str, ask: Ask, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    whole = [line for line in recording.lines if not line.startswith('{"error"')]
    received: list[Any] = []

    with replayed(Tape(version, name), folder=tmp_path) as router:
        with pytest.raises(StreamBrokenError, match=BROKEN[name]) as caught:
            await ask(router, recording, received)

    assert caught.value.parts == len(received) == len(whole)
    assert caught.value.node_id == NODE.id
    text = "".join(
        part.message.content if recording.path == "/api/chat" else part.response
        for part in received
    )
    assert text == recording.text
    assert all(part.routing_decision is None for part in received)


# --------------------------------------------------------------- as OpenAI speaks it


async def post_sync(router: Router, recording: Recording) -> tuple[int, bytes, Exception | None]:
    received = b""
    with httpx.Client(transport=HydraTransport(router=router)) as client:
        try:
            with client.stream(  # noqa: ASYNC212  # it replays
                "POST", "http://hydra" + recording.path, json=recording.asked
            ) as answer:
                for data in answer.iter_bytes():
                    received += data
                return answer.status_code, received, None
        except Exception as error:
            return 0, received, error


async def post_async(router: Router, recording: Recording) -> tuple[int, bytes, Exception | None]:
    received = b""
    async with httpx.AsyncClient(transport=AsyncHydraTransport(router=router)) as client:
        try:
            async with client.stream(
                "POST", "http://hydra" + recording.path, json=recording.asked
            ) as answer:
                async for data in answer.aiter_bytes():
                    received += data
                return answer.status_code, received, None
        except Exception as error:
            return 0, received, error


EACH_TRANSPORT = pytest.mark.parametrize(
    "post", [post_sync, post_async], ids=["HydraTransport", "AsyncHydraTransport"]
)
V1 = (
    "v1-chat-nonstream v1-chat-stream v1-chat-stream-usage v1-completions v1-embeddings "
    "v1-toolcall-nonstream v1-toolcall-stream v1-think-stream"
).split()


@EACH_VERSION
@EACH_TRANSPORT
@pytest.mark.parametrize("name", V1)
async def test_openai_style_answers_pass_byte_for_byte(
    name: str, post: Any, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)

    with replayed(Tape(version, name), folder=tmp_path) as router:
        status, received, error = await post(router, recording)

    assert error is None
    assert (status, received.decode()) == (200, recording.content)


V1_ERRORS: Mapping[str, type[Exception]] = {
    "runner-sigkill-v1-midstream": StreamBrokenError,
    "server-sigkill-v1-midstream": StreamBrokenError,
    "token-repeat-abort-v1-stream": StreamBrokenError,
    "err-queue-full-v1": AllNodesFailedError,
    "v1-unknown-model": AllNodesFailedError,
}


@EACH_VERSION
@EACH_TRANSPORT
@pytest.mark.parametrize("name", V1_ERRORS)
async def test_an_openai_style_answer_that_fails_is_an_error(
    name: str, post: Any, version: str, tmp_path: Path
) -> None:
    recording = Recording(version, name)
    kind = V1_ERRORS[name]
    deleted = (recording.asked["model"],) if name == "v1-unknown-model" else ()

    with replayed(Tape(version, name, deleted=deleted), folder=tmp_path) as router:
        _, received, error = await post(router, recording)

    assert type(error) is kind
    # A runner that dies is no error on this path, but an end without its mark.
    if kind is StreamBrokenError:
        assert received.decode() == recording.content
        assert b"[DONE]" not in received
    else:
        assert received == b""


# ------------------------------------------------------------------------ the replay


def test_a_cassette_says_what_it_was_made_with_and_can_be_read(tmp_path: Path) -> None:
    text = Tape("0.24.0", "chat-stream").write(tmp_path).read_text()

    assert text.startswith("# Ollama 0.24.0: tags, version, ps-idle, chat-stream\n")
    for line in Recording("0.24.0", "chat-stream").lines:
        assert f"\n        {line}\n" in text


def test_another_body_is_another_request(tmp_path: Path) -> None:
    recording = Recording("0.32.15", "chat-nonstream")
    arguments = arguments_of(recording)

    with pytest.raises(AssertionError, match="nobody asked for POST /api/chat"):
        with replayed(Tape("0.32.15", "chat-nonstream"), folder=tmp_path) as router:
            with pytest.raises(CannotOverwriteExistingCassetteException):
                Client(router=router).chat(**{**arguments, "options": {"seed": 43}})


def test_what_goes_unplayed_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nobody asked for POST /api/embed"):
        with replayed(Tape("0.32.15", "embed-single"), folder=tmp_path):
            pass


def test_nothing_is_played_twice(tmp_path: Path) -> None:
    recording = Recording("0.32.15", "embed-single")

    with replayed(Tape("0.32.15", "embed-single"), folder=tmp_path) as router:
        client = Client(router=router)
        assert client.embed(**recording.asked).embeddings
        with pytest.raises(CannotOverwriteExistingCassetteException):
            client.embed(**recording.asked)
