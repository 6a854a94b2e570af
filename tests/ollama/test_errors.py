"""What goes wrong on the wire: whose fault it is, and that nothing of it is repeated."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.exceptions import (
    ModelLoadError,
    ModelNotFoundError,
    NodeAuthError,
    NodeBusyError,
    NodeConnectError,
    NodeError,
    NodeProtocolError,
    NodeResponseError,
    NodeTimeoutError,
)
from hydra_llm.ollama.answers import error_text
from hydra_llm.ollama.errors import error_of_answer, error_of_exception
from hydra_llm.types import Node

RECORDINGS = Path(__file__).parents[1] / "recordings"
NODE = Node("http://user:hush-hush@rig:11434", id="rig")


def error_of(status: int, text: str | None, **headers: str) -> NodeError | None:
    return error_of_answer(NODE, "llama3", status, text, httpx.Headers(headers))


# ------------------------------------------------- the table of BEHAVIOUR, section 4

GO_DECODER = "json: cannot unmarshal string into Go struct field ChatRequest.messages"
NESTED = '{"error":{"code":400,"message":"%s","type":"invalid_request_error"}}'
CRASHED = "an error was encountered while running the model: unexpected EOF"

TABLE: list[tuple[str, int, str, type[NodeError] | None]] = [
    ("unknown model, chat", 404, "model 'nope' not found", ModelNotFoundError),
    (
        "unknown model, embed",
        404,
        'model "nope" not found, try pulling it first',
        ModelNotFoundError,
    ),
    ("unknown model, show", 404, "model 'nope:latest' not found", ModelNotFoundError),
    ("no model field, chat", 400, "model is required", None),
    ("no model field, generate", 404, "model '' not found", ModelNotFoundError),
    ("impossible name", 400, "invalid model name", None),
    ("empty body", 400, "missing request body", None),
    ("broken JSON", 400, "unexpected EOF", None),
    ("wrong type of a field", 400, GO_DECODER, None),
    ("wrong type of an option", 500, 'option "num_ctx" must be of type integer', None),
    ("unit of keep_alive", 400, 'time: unknown unit " apples" in duration "5 apples"', None),
    ("keep_alive without unit", 400, 'time: missing unit in duration "300"', None),
    (
        "format",
        500,
        'invalid format: "yaml"; expected "json" or a valid JSON Schema object',
        None,
    ),
    ("schema, 0.32", 400, NESTED % "JSON schema conversion failed", None),
    ("schema, 0.24", 500, "invalid JSON schema in format", None),
    ("tools", 400, "registry.ollama.ai/library/x does not support tools", None),
    ("think", 400, '"x" does not support thinking', None),
    ("think value", 400, 'invalid think value: "maximal"', None),
    ("chat on an embedding model", 400, '"x" does not support chat', None),
    ("embed on a completion model", 501, "This server does not support embeddings.", None),
    ("images", 400, NESTED % "Multimodal data provided", None),
    ("input too long", 400, "the input length exceeds the context length", None),
    (
        "memory, 0.24",
        500,
        "model requires more system memory (384.0 GiB) than is available (22.1 GiB)",
        ModelLoadError,
    ),
    (
        "memory, 0.32",
        500,
        "llama-server process has terminated: exit status 1: ggml failed to allocate buffer",
        ModelLoadError,
    ),
    (
        "queue full",
        503,
        "server busy, please try again.  maximum pending requests exceeded",
        NodeBusyError,
    ),
    ("runner killed", 500, CRASHED, NodeResponseError),
    (
        "runner killed, 0.24",
        500,
        "model runner has unexpectedly stopped, this may be due to resource limitations",
        NodeResponseError,
    ),
    (
        "killed while loading, 0.32",
        500,
        "llama-server process has terminated: signal: killed",
        ModelLoadError,
    ),
    (
        "killed while loading, 0.24",
        500,
        "llama runner process has terminated with exit code -1",
        ModelLoadError,
    ),
    ("error line", -1, CRASHED, NodeResponseError),
    ("wrong path", 404, "404 page not found", None),
    ("wrong method", 405, "", None),
    ("foreign Host", 403, "", NodeAuthError),
]
OUTSIDE_OLLAMA: list[tuple[str, int, str, type[NodeError] | None]] = [
    ("unauthorized", 401, "", NodeAuthError),
    ("too many requests", 429, "", NodeBusyError),
    ("request timeout", 408, "", NodeTimeoutError),
    ("moved", 301, "", NodeProtocolError),
    ("temporary redirect", 307, "", NodeProtocolError),
    ("bad gateway", 502, "", NodeResponseError),
    ("gateway timeout", 504, "", NodeResponseError),
    ("too large", 413, "", None),
]
OUT_OF_MEMORY = (
    "out of memory",
    "out of device memory",
    "cudaMalloc failed",
    "hipMalloc failed",
    "failed to allocate",
    "allocation failed",
    "not enough memory",
    "insufficient memory",
    "vk_error_out_of_device_memory",
    "erroroutofmemory",
)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [row[1:] for row in TABLE + OUTSIDE_OLLAMA],
    ids=[row[0] for row in TABLE + OUTSIDE_OLLAMA],
)
def test_a_status_is_the_nodes_error_or_the_callers(
    status: int, text: str, kind: type[NodeError] | None
) -> None:
    error = error_of(status, text)

    assert (None if error is None else type(error)) is kind
    if error is not None:
        assert error.node_id == "rig"
        assert getattr(error, "status_code", status) == status


@pytest.mark.parametrize("fragment", OUT_OF_MEMORY)
@pytest.mark.parametrize("status", [500, -1])
def test_every_text_ollama_knows_for_want_of_memory_is_a_failed_load(
    fragment: str, status: int
) -> None:
    assert type(error_of(status, f"CUDA error: {fragment.upper()} at x.cu:1")) is ModelLoadError


RECORDED: dict[str, type[NodeError] | None] = {
    "chat-embedding-model": None,
    "chat-format-bad-schema": None,
    "chat-format-invalid": None,
    "chat-think-bad-value": None,
    "chat-think-true-unsupported": None,
    "chat-tool-arguments-as-string": None,
    "chat-tools-unsupported": None,
    "embed-too-long-truncate-false": None,
    "err-bad-host-header": NodeAuthError,
    "err-bad-model-name": None,
    "err-empty-body": None,
    "err-keep-alive-bad": None,
    "err-malformed-json": None,
    "err-memory-huge-num_ctx": ModelLoadError,
    "err-memory-huge-num_ctx-stream": ModelLoadError,
    "err-messages-wrong-type": None,
    "err-method-not-allowed": None,
    "err-not-found-path": None,
    "err-option-wrong-type": None,
    "err-queue-full-chat": NodeBusyError,
    "err-queue-full-embed": NodeBusyError,
    "err-queue-full-generate": NodeBusyError,
    "err-queue-full-v1": NodeBusyError,
    "err-unknown-model-chat": ModelNotFoundError,
    "err-unknown-model-embed": ModelNotFoundError,
    "err-unknown-model-generate": ModelNotFoundError,
    "err-unknown-model-show": ModelNotFoundError,
    "generate-embedding-model": None,
    "runner-sigkill-before-first-token": NodeResponseError,
    "runner-sigkill-nonstream": NodeResponseError,
    "runner-sigkill-while-loading": ModelLoadError,
    "v1-malformed": None,
    "v1-unknown-model": ModelNotFoundError,
}


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_error_is_told_apart(version: str, name: str) -> None:
    response = json.loads((RECORDINGS / f"v{version}-{name}.json").read_text())["response"]
    body = response.get("body")
    if body is None:
        body = response["chunks"][0]["line"]
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()

    error = error_of(response["status"], error_text(data))

    assert (None if error is None else type(error)) is RECORDED[name]


# ------------------------------------------------------------------------- messages

STATUSES = st.sampled_from([-1, 301, 400, 401, 403, 404, 408, 429, 500, 501, 502, 503, 504])


@given(
    status=STATUSES,
    before=st.sampled_from(["", "out of memory: ", "model 'x' not found ", 'option "', "CUDA "]),
)
def test_a_message_repeats_nothing_of_what_the_node_said(status: int, before: str) -> None:
    error = error_of(status, before + "my secret prompt\nand more")

    if error is not None:
        assert "secret" not in str(error)
        assert "secret" not in repr(error.__dict__)
        assert "hush" not in f"{error} {error.__dict__}"
        assert "\n" not in str(error)
        assert str(error).startswith("rig ")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("999999", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_a_busy_node_may_say_how_long(value: str, seconds: float | None) -> None:
    error = error_of(503, "server busy", **{"retry-after": value})

    assert isinstance(error, NodeBusyError)
    assert error.retry_after_seconds == seconds
    assert error.status_code == 503


def test_a_busy_node_may_say_nothing() -> None:
    error = error_of(429, None)

    assert isinstance(error, NodeBusyError)
    assert error.retry_after_seconds is None


# ------------------------------------------------------------------------ exceptions

CERTIFICATE = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate")

EXCEPTIONS: list[tuple[httpx.HTTPError, type[NodeError], str, str]] = [
    (
        httpx.ConnectError("[Errno 111] Connection refused"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: connection refused",
    ),
    (
        httpx.ConnectError("[Errno -2] Name or service not known"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: unknown host name",
    ),
    (
        httpx.ConnectError("[Errno 113] No route to host"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: no route to host",
    ),
    (
        httpx.ConnectError(str(CERTIFICATE)),
        NodeConnectError,
        "connect",
        "rig cannot be reached: its TLS certificate is not trusted",
    ),
    (
        httpx.ConnectError("[SSL] record layer failure"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: TLS failed",
    ),
    (
        httpx.ConnectError("http://user:hush-hush@rig"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: connection failed",
    ),
    (
        httpx.ConnectTimeout("timed out"),
        NodeConnectError,
        "connect",
        "rig cannot be reached: timed out",
    ),
    (
        httpx.ReadTimeout("timed out"),
        NodeTimeoutError,
        "timeout",
        "rig stayed silent for too long",
    ),
    (
        httpx.WriteTimeout("timed out"),
        NodeTimeoutError,
        "timeout",
        "rig stayed silent for too long",
    ),
    (
        httpx.PoolTimeout("timed out"),
        NodeTimeoutError,
        "timeout",
        "rig stayed silent for too long",
    ),
    (httpx.ReadError("reset"), NodeConnectError, "reset", "rig broke the connection"),
    (httpx.WriteError("pipe"), NodeConnectError, "reset", "rig broke the connection"),
    (httpx.CloseError("x"), NodeConnectError, "reset", "rig broke the connection"),
    (
        httpx.RemoteProtocolError("incomplete chunked read"),
        NodeConnectError,
        "reset",
        "rig broke the connection",
    ),
    (
        httpx.LocalProtocolError("illegal header value b'hush-hush'"),
        NodeProtocolError,
        "protocol",
        "rig does not speak HTTP properly",
    ),
    (
        httpx.DecodingError("gzip"),
        NodeProtocolError,
        "protocol",
        "rig does not speak HTTP properly",
    ),
]


@pytest.mark.parametrize(
    ("raised", "kind", "cause", "message"),
    EXCEPTIONS,
    ids=lambda value: repr(value) if isinstance(value, httpx.HTTPError) else "",
)
def test_no_exception_of_httpx_leaves_as_it_came(
    raised: httpx.HTTPError, kind: type[NodeError], cause: str, message: str
) -> None:
    error = error_of_exception(NODE, raised)

    assert type(error) is kind
    assert error.cause == cause
    assert str(error) == message
    assert "hush" not in f"{error} {error.__dict__}"


def test_what_is_no_connection_is_one_for_those_who_catch_pythons_own() -> None:
    caught: list[Any] = [
        error_of_exception(NODE, httpx.ConnectError("refused")),
        error_of_exception(NODE, httpx.ReadTimeout("")),
    ]

    assert isinstance(caught[0], ConnectionError)
    assert isinstance(caught[1], TimeoutError)
