"""Translates what goes wrong on the wire, once, at the border.

Texts and statuses are those of BEHAVIOUR section 4. Ollama's own text may quote a prompt
or a tool argument, so it is looked at here but never becomes part of a message of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import httpx

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
from hydra_llm.types import Node

_LOAD_FAILURES = re.compile(
    r"out of memory|out of device memory|cudamalloc failed|hipmalloc failed|failed to allocate"
    r"|allocation failed|not enough memory|insufficient memory|erroroutofmemory"
    r"|vk_error_out_of_device_memory|requires more system memory"
    r"|llama-server process has terminated|llama runner process has terminated"
    r"|timed out waiting for llama|unable to load model|error loading model",
    re.IGNORECASE,
)
_CALLERS_FAULT = re.compile(r'^option "|^invalid format|^invalid json schema', re.IGNORECASE)
"""Ollama answers 500 to some mistakes of the caller."""


def error_of_answer(
    node: Node, model: str, status: int, text: str | None, headers: Mapping[str, str]
) -> NodeError | None:
    """
    The node's error behind an HTTP status; None where the caller is at fault.

    Args:
        node: who answered.
        model: the model asked for.
        status: HTTP status; -1 for an error inside a 200 answer.
        text: Ollama's error text, if the body was one.
        headers: of the answer.
    """
    where = {"node_id": node.id, "node_url": node.url}
    text = text or ""
    if status in (401, 403):
        hint = "its credentials" if status == 401 else "its credentials or the Host it allows"
        return NodeAuthError(
            f"{node.id} refuses access ({status}); check {hint} (Node(headers=...))", **where
        )
    if status in (429, 503):
        return NodeBusyError(
            f"{node.id} is busy ({status})",
            status_code=status,
            retry_after_seconds=_retry_after(headers),
            **where,
        )
    if status == 404 and "not found" in text and "page not found" not in text:
        return ModelNotFoundError(f"{node.id} does not have {model!r}", status_code=404, **where)
    if status == 408:
        return NodeTimeoutError(f"{node.id} gave up waiting (408)", **where)
    if 300 <= status < 400:
        return NodeProtocolError(
            f"{node.id} redirects ({status}); configure the URL it leads to", **where
        )
    if 400 <= status < 500 or status == 501 or _CALLERS_FAULT.match(text):
        return None
    if _LOAD_FAILURES.search(text):
        return ModelLoadError(
            f"{node.id} could not load {model!r} ({status})", status_code=status, **where
        )
    what = "an error inside its answer" if status == -1 else f"status {status}"
    return NodeResponseError(f"{node.id} answered with {what}", status_code=status, **where)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < 86_400.0 else None


def error_of_exception(node: Node, exc: httpx.HTTPError) -> NodeError:
    """The node's error behind an exception of httpx."""
    where = {"node_id": node.id, "node_url": node.url}
    if isinstance(exc, (httpx.ConnectError, httpx.ConnectTimeout)):
        what = "timed out" if isinstance(exc, httpx.ConnectTimeout) else _connect_reason(exc)
        return NodeConnectError(f"{node.id} cannot be reached: {what}", **where)
    if isinstance(exc, httpx.TimeoutException):
        return NodeTimeoutError(f"{node.id} stayed silent for too long", **where)
    if isinstance(exc, (httpx.NetworkError, httpx.RemoteProtocolError)):
        error = NodeConnectError(f"{node.id} broke the connection", **where)
        error.cause = "reset"
        return error
    return NodeProtocolError(f"{node.id} does not speak HTTP properly", **where)


def _connect_reason(exc: httpx.ConnectError) -> str:
    text = " ".join(_said(exc)).lower()
    for mark, reason in (
        ("refused", "connection refused"),
        ("certificate", "its TLS certificate is not trusted"),
        ("ssl", "TLS failed"),
        ("name or service", "unknown host name"),
        ("nodename", "unknown host name"),
        ("getaddrinfo", "unknown host name"),
        ("name resolution", "unknown host name"),
        ("no route", "no route to host"),
        ("unreachable", "network unreachable"),
    ):
        if mark in text:
            return reason
    return "connection failed"


def _said(exc: BaseException) -> Iterator[str]:
    """What an exception and those behind it are: in an event loop httpx's own says little."""
    seen: BaseException | None = exc
    while seen is not None:
        # anyio groups the attempts where a name has several addresses.
        for one in (seen, *getattr(seen, "exceptions", ())):
            yield f"{type(one).__name__} {one}"
        seen = seen.__cause__ or seen.__context__
