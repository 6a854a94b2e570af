"""What a request asks for, read from its JSON, whoever wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.dispatch import encode
from hydra_llm.ollama.calls import (
    BLOCK_CHARACTERS,
    CHARACTERS_PER_TOKEN,
    IMAGE_TOKENS,
    Call,
    Framing,
    Route,
    read_call,
    with_context,
)
from hydra_llm.types import NO_OPTIONS, RunnerOptions

HELLO = [{"role": "user", "content": "Hello"}]


def read(path: str, **payload: Any) -> Call:
    return read_call("POST", path, {"model": "m", **payload})


# ------------------------------------------------------------------------- routes

ROUTES: list[tuple[str, str, Route]] = [
    ("POST", "/api/chat", Route.INFERENCE),
    ("POST", "/api/generate", Route.INFERENCE),
    ("POST", "/api/embed", Route.INFERENCE),
    ("POST", "/api/embeddings", Route.INFERENCE),
    ("POST", "/v1/chat/completions", Route.INFERENCE),
    ("POST", "/v1/completions", Route.INFERENCE),
    ("POST", "/v1/responses", Route.INFERENCE),
    ("POST", "/v1/messages", Route.INFERENCE),
    ("POST", "/v1/embeddings", Route.INFERENCE),
    ("POST", "/api/show", Route.MODEL),
    ("GET", "/v1/models/m", Route.MODEL),
    ("GET", "/api/tags", Route.CATALOGUE),
    ("GET", "/api/ps", Route.CATALOGUE),
    ("GET", "/v1/models", Route.CATALOGUE),
    ("GET", "/v1/models/", Route.CATALOGUE),
    ("GET", "/api/version", Route.ANY),
    ("GET", "/api/status", Route.ANY),
    ("HEAD", "/", Route.ANY),
    ("POST", "/api/pull", Route.ADMIN),
    ("POST", "/api/push", Route.ADMIN),
    ("POST", "/api/create", Route.ADMIN),
    ("POST", "/api/copy", Route.ADMIN),
    ("DELETE", "/api/delete", Route.ADMIN),
    ("POST", "/api/blobs/sha256:0", Route.ADMIN),
    ("POST", "/api/signout", Route.ADMIN),
    ("POST", "/nothing/we/know", Route.ADMIN),
]


@pytest.mark.parametrize(("method", "path", "route"), ROUTES, ids=str)
def test_what_becomes_of_a_request_is_told_by_its_path(
    method: str, path: str, route: Route
) -> None:
    assert read_call(method, path, None).route is route
    assert read_call(method, path, {"model": "m"}).route is route
    assert read_call(method, path + "/", None).route is route


def test_a_path_may_name_the_model() -> None:
    assert read_call("GET", "/v1/models/ns/x:1b", None).model == "ns/x:1b"


@pytest.mark.parametrize(
    ("payload", "model"),
    [
        ({"model": "a", "name": "b"}, "a"),
        ({"name": "b"}, "b"),
        ({"model": ""}, ""),
        ({"model": 7}, ""),
        ({}, ""),
    ],
)
def test_the_model_is_called_model_or_name(payload: dict[str, Any], model: str) -> None:
    call = read_call("POST", "/api/chat", payload)

    assert call.model == model
    assert call.model_name == (f"{model}:latest" if model else "")


# ------------------------------------------------------------------------ framing

JSON, NDJSON, SSE = Framing.JSON, Framing.NDJSON, Framing.SSE
FRAMINGS: list[tuple[str, Framing, Framing, Framing]] = [
    # path, stream absent, true, false
    ("/api/chat", NDJSON, NDJSON, JSON),
    ("/api/generate", NDJSON, NDJSON, JSON),
    ("/api/embed", JSON, JSON, JSON),
    ("/api/embeddings", JSON, JSON, JSON),
    ("/v1/chat/completions", JSON, SSE, JSON),
    ("/v1/completions", JSON, SSE, JSON),
    ("/v1/responses", JSON, SSE, JSON),
    ("/v1/messages", JSON, SSE, JSON),
    ("/v1/embeddings", JSON, JSON, JSON),
    ("/api/show", JSON, JSON, JSON),
]


@pytest.mark.parametrize(("path", "absent", "yes", "no"), FRAMINGS, ids=str)
def test_the_native_api_streams_by_default_and_the_others_do_not(
    path: str, absent: Framing, yes: Framing, no: Framing
) -> None:
    assert read(path).framing is absent
    assert read(path, stream=None).framing is absent
    assert read(path, stream=True).framing is yes
    assert read(path, stream=False).framing is no


def test_a_wrong_type_of_stream_promises_no_stream() -> None:
    assert read("/api/chat", stream="yes").framing is JSON


# ------------------------------------------------------------------------ options


def test_the_options_that_restart_a_runner_are_read() -> None:
    given = {
        "num_ctx": 8192,
        "num_batch": 256,
        "num_gpu": 0,
        "main_gpu": 1,
        "num_thread": 4,
        "use_mmap": False,
        "temperature": 0.1,
        "seed": 3,
    }

    assert read("/api/chat", options=given).options == RunnerOptions(
        num_ctx=8192, num_batch=256, num_gpu=0, main_gpu=1, num_thread=4, use_mmap=False
    )
    assert read("/api/chat", options={"temperature": 0.1}).options is NO_OPTIONS
    assert read("/api/chat", options={"num_ctx": 2048.9}).options.num_ctx == 2048


@pytest.mark.parametrize(
    "wrong", ["4096", True, None, [4096], {}, float("nan"), float("inf"), -float("inf")]
)
def test_an_option_of_a_wrong_type_is_ollamas_to_refuse(wrong: Any) -> None:
    assert read("/api/chat", options={"num_ctx": wrong}).options is NO_OPTIONS
    assert read("/api/chat", options={"num_predict": wrong}).output_limit is None


@pytest.mark.parametrize("options", ["num_ctx", 7, ["num_ctx"], True, None])
def test_options_that_are_no_object_are_ollamas_to_refuse(options: Any) -> None:
    assert read("/api/chat", options=options).options is NO_OPTIONS


@pytest.mark.parametrize(
    ("path", "payload", "limit"),
    [
        ("/api/chat", {}, None),
        ("/api/chat", {"options": {"num_predict": 16}}, 16),
        ("/api/chat", {"options": {"num_predict": 0}}, 0),
        ("/api/chat", {"options": {"num_predict": -1}}, None),
        ("/v1/chat/completions", {"max_tokens": 7}, 7),
        ("/v1/chat/completions", {"max_completion_tokens": 5, "max_tokens": 7}, 5),
        ("/v1/responses", {"max_output_tokens": 9}, 9),
        ("/v1/chat/completions", {"max_tokens": "7"}, None),
        ("/api/embed", {"options": {"num_predict": 16}}, 0),
        ("/v1/embeddings", {}, 0),
    ],
)
def test_the_callers_limit_of_the_answer(
    path: str, payload: dict[str, Any], limit: int | None
) -> None:
    assert read(path, **payload).output_limit == limit


# ------------------------------------------------------------------- capabilities

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("payload", "needed"),
    [
        ({}, set()),
        ({"tools": []}, set()),
        ({"tools": [{"type": "function"}]}, {"tools"}),
        ({"think": False}, set()),
        ({"think": True}, {"thinking"}),
        ({"think": "high"}, {"thinking"}),
        ({"suffix": "end"}, {"insert"}),
        ({"images": ["AA=="]}, {"vision"}),
        ({"messages": [{"role": "user", "content": "", "images": []}]}, set()),
        ({"messages": [{"role": "user", "content": "", "images": ["AA=="]}]}, {"vision"}),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, {"vision"}),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, {"vision"}),
        ({"tools": [{}], "think": True, "images": ["A"]}, {"tools", "thinking", "vision"}),
    ],
)
def test_what_the_model_has_to_be_able_to_do(payload: dict[str, Any], needed: set[str]) -> None:
    assert read("/api/chat", **payload).capabilities == needed


# ------------------------------------------------------------------------- tokens


def test_the_length_of_a_prompt_is_estimated_from_its_characters() -> None:
    text = "x" * 400

    chat = read("/api/chat", messages=[{"role": "user", "content": text}])
    several = read("/api/chat", messages=[{"role": "user", "content": text}] * 3)
    generate = read("/api/generate", prompt=text)

    assert chat.input_tokens == 400 // CHARACTERS_PER_TOKEN + 4
    assert several.input_tokens == 3 * chat.input_tokens
    assert generate.input_tokens == 400 // CHARACTERS_PER_TOKEN + 1
    assert read("/api/embed", input=text).input_tokens == generate.input_tokens
    assert read("/api/embed", input=[text, text]).input_tokens == 2 * chat.input_tokens
    assert read("/api/chat").input_tokens == 0


def test_a_picture_counts_as_many_tokens() -> None:
    plain = read("/api/chat", messages=[{"role": "user", "content": "What is this?"}])
    shown = read(
        "/api/chat", messages=[{"role": "user", "content": "What is this?", "images": ["AA=="]}]
    )

    assert shown.input_tokens - plain.input_tokens == IMAGE_TOKENS


def test_parts_of_a_message_count_as_its_text() -> None:
    parts = [{"type": "text", "text": "x" * 200}, {"type": "text", "text": "y" * 200}, PICTURE]

    whole = read("/v1/chat/completions", messages=[{"role": "user", "content": parts}])

    assert whole.input_tokens == 100 + IMAGE_TOKENS + 4


def test_a_conversation_that_goes_on_begins_with_the_same_parts() -> None:
    first = read("/api/chat", messages=HELLO)
    longer = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Go on"}]
    second = read("/api/chat", messages=longer)
    other = read("/api/chat", messages=[{"role": "user", "content": "Goodbye"}])

    assert len(second.parts) == 3
    assert second.parts[:1] == first.parts
    assert other.parts != first.parts


@pytest.mark.parametrize(
    "changed",
    [
        {"system": "Be brief."},
        {"tools": [{"type": "function"}]},
        {"messages": [{"role": "system", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hello", "images": ["AA=="]}]},
    ],
)
def test_what_changes_the_prompts_beginning_changes_its_parts(changed: dict[str, Any]) -> None:
    plain = read("/api/chat", messages=HELLO)
    other = read("/api/chat", **{"messages": HELLO, **changed})

    assert {part.hash for part in plain.parts}.isdisjoint(part.hash for part in other.parts)


def test_a_long_prompt_has_a_part_for_every_block_it_begins_with() -> None:
    short = read("/api/generate", prompt="x" * BLOCK_CHARACTERS[0])
    long = read("/api/generate", prompt="x" * BLOCK_CHARACTERS[1] + "y")
    same_beginning = read("/api/generate", prompt="x" * BLOCK_CHARACTERS[1] + "z")

    assert len(short.parts) == 1
    assert len(long.parts) == 3
    assert short.parts[0] == long.parts[0]
    assert long.parts[:2] == same_beginning.parts[:2]
    assert long.parts[2] != same_beginning.parts[2]


def test_no_word_of_the_prompt_is_kept_but_in_the_payload() -> None:
    call = read("/api/chat", messages=[{"role": "user", "content": "the secret word"}])

    assert "secret" not in repr(call.parts)


# ----------------------------------------------------------------- whatever comes

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "model name stream options messages tools think suffix images prompt input system "
    "max_tokens max_completion_tokens max_output_tokens keep_alive format".split()
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "images"]), JSON_VALUES), max_size=3
)
OPTIONS = st.dictionaries(
    st.sampled_from(["num_ctx", "num_predict", "use_mmap", "seed", "main_gpu"]), JSON_VALUES
)
PAYLOADS = st.builds(
    lambda fields, known: {**fields, **known},
    st.dictionaries(FIELDS, JSON_VALUES),
    st.fixed_dictionaries({}, optional={"messages": MESSAGES, "options": OPTIONS}),
)


@given(path=st.sampled_from([path for _, path, _ in ROUTES]), payload=PAYLOADS)
def test_no_json_whatever_makes_reading_fail(path: str, payload: dict[str, Any]) -> None:
    call = read_call("POST", path, payload)

    assert call.input_tokens >= 0
    assert isinstance(call.model_name, str)
    assert call.output_limit is None or call.output_limit >= 0


# ------------------------------------------------------------------- the context

# What Ollama's clients send: JSON without the values that only Python knows.
PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
PLAIN_OPTIONS = st.dictionaries(st.sampled_from(["seed", "stop", "temperature"]), PLAIN_VALUES)
ENCODERS = st.sampled_from(
    [
        encode,
        lambda payload: json.dumps(payload).encode(),
        lambda payload: json.dumps(payload, indent=2).encode(),
        lambda payload: b" \r\n\t" + json.dumps(payload).encode(),
    ]
)


@given(
    fields=st.dictionaries(FIELDS.filter(lambda name: name != "options"), PLAIN_VALUES),
    options=st.none() | PLAIN_OPTIONS,
    has_options=st.booleans(),
    encoder=ENCODERS,
    context=st.integers(1, 2**20),
)
def test_splicing_the_context_in_equals_encoding_all_of_it_again(
    fields: dict[str, Any], options: dict[str, Any] | None, has_options: bool, encoder: Any,
    context: int,
) -> None:  # fmt: skip
    payload = {**fields, "options": options} if has_options else fields

    changed, body = with_context(payload, encoder(payload), context)

    said = (options if has_options else None) or {}
    assert changed == {**payload, "options": {**said, "num_ctx": context}}
    assert json.loads(encode(changed) if body is None else body) == changed


def test_a_request_without_options_is_not_encoded_again() -> None:
    body = b'{"model":"m","prompt":"\\u003c"}'

    _, spliced = with_context(json.loads(body), body, 4096)

    assert spliced == b'{"options":{"num_ctx":4096},"model":"m","prompt":"\\u003c"}'


@pytest.mark.parametrize(
    "options", [{"num_ctx": 2048}, {"num_ctx": "4096"}, {"num_ctx": True}, "abc", 7, [1], False]
)
def test_what_the_caller_said_of_the_context_is_sent_as_it_is_right_or_wrong(options: Any) -> None:
    payload = {"model": "m", "options": options}
    body = json.dumps(payload).encode()

    assert with_context(payload, body, 8192) == (payload, body)


def test_what_is_embedded_is_counted_and_leaves_nothing_to_be_cached() -> None:
    call = read("/api/embed", input=["some text"] * 3)

    assert call.input_tokens > 0
    assert call.parts == ()
