"""What an answer of a node means: an answer, the caller's mistake, or the node's failure.

Nothing here waits or moves bytes: the sync and the async transport share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import httpx

from hydra_llm.dispatch import Dispatch, encode, outgoing_request
from hydra_llm.exceptions import AllNodesFailedError, NodeError, NodeProtocolError
from hydra_llm.ollama.answers import AnswerReader, error_text, is_answer, read_whole
from hydra_llm.ollama.calls import Call, Route
from hydra_llm.ollama.continuation import (
    NotContinued,
    check_first_part,
    check_prompt,
    marked,
    render_request,
)
from hydra_llm.ollama.errors import error_of_answer
from hydra_llm.types import Attempt, Node, canonical_model_name
from hydra_llm.words import HEADER_PREFIX

_PREFIX = HEADER_PREFIX.encode()

DISPATCH_EXTENSION = "hydra_dispatch"
"""Response extension: the :class:`Dispatch`, whose ``decision()`` explains."""
DOCUMENT_EXTENSION = "hydra_document"
"""Response extension: the parsed JSON of an answer that came in one piece."""

_DROPPED_HEADERS = frozenset({b"content-length", b"content-encoding", b"transfer-encoding"})
_WITHHELD_HEADERS = frozenset({b"set-cookie", b"set-cookie2"})
"""A client would send what one node has set to whichever comes next."""


def _header(response: httpx.Response, wanted: bytes) -> str:
    # httpx's own look-up first tries to decode all headers; this one is needed for each answer.
    for name, value in response.headers.raw:
        if name.lower() == wanted:
            return value.decode("latin-1")
    return ""


def check_encoding(node: Node, response: httpx.Response) -> None:
    """Raise if the answer is compressed: nobody has asked for that, and it may be a bomb."""
    if _header(response, b"content-encoding") not in ("", "identity"):
        raise NodeProtocolError(
            f"{node.id} compressed its answer unasked; switch that off in the proxy before it",
            node_id=node.id,
            node_url=node.url,
        )


def check_content_type(node: Node, response: httpx.Response) -> None:
    """Raise if the answer cannot be one of Ollama's, before any of it is read."""
    check_encoding(node, response)
    kind = _header(response, b"content-type")
    if kind and not any(word in kind for word in ("json", "event-stream")):
        raise NodeProtocolError(
            f"{node.id} answered with {kind.partition(';')[0][:60]!r}, not with JSON; "
            "is another server listening there?",
            node_id=node.id,
            node_url=node.url,
        )


def is_stream(response: httpx.Response) -> bool:
    """Load-only and unload requests are answered in one piece, even if a stream was asked for."""
    kind = _header(response, b"content-type")
    return "ndjson" in kind or "event-stream" in kind


def check_part(dispatch: Dispatch, reader: AnswerReader, *, ended: bool) -> None:
    """
    Raise if what the reader has seen so far is no good answer.

    Before anything was handed out the next node can be asked, so a first part counts only if it is
    whole: cut off, it is as good as none.
    """
    node = dispatch.node
    if reader.is_too_long:
        raise too_long_line(node)
    if reader.is_no_json:
        raise no_json(node)
    if reader.error is not None:
        error = error_of_answer(node, dispatch.call.model, -1, reader.error, {})
        raise error or _unclear(node)
    if ended and not reader.is_complete:
        raise dispatch.incomplete(reader.parts)


def render_question(node: Node, request: httpx.Request, outgoing: httpx.Request) -> httpx.Request:
    """Ask a node for the prompt that it would make of a request."""
    body = encode(render_request(outgoing.read()))
    return outgoing_request(node, request, body, outgoing.extensions["timeout"])


def check_shown(dispatch: Dispatch, response: httpx.Response, shown: bytes, beginning: str) -> None:
    """Raise NotContinued or NodeError if a node would not go on with the answer's beginning."""
    if response.status_code != 200:
        raise no_continuation(dispatch, response, shown)
    check_prompt(shown, beginning, dispatch.node.id)


def no_continuation(dispatch: Dispatch, response: httpx.Response, body: bytes) -> Exception:
    """The error for a node that answers in another way than by going on with the stream."""
    node, status = dispatch.node, response.status_code
    code = -1 if status == 200 else status
    error = error_of_answer(node, dispatch.call.model, code, error_text(body), response.headers)
    return error or NotContinued(f"{node.id} refuses to go on ({status})")


def check_continuation(dispatch: Dispatch, held: bytes, beginning: str) -> bytes:
    """
    The first part of another node's continuation, marked as such.

    Raises:
        NotContinued: it is none.
    """
    line, end, more = held.partition(b"\n")
    check_first_part(line, beginning, dispatch.node.id)
    return marked(line, dispatch.begun_by) + end + more


def _unclear(node: Node) -> NodeProtocolError:
    return NodeProtocolError(
        f"{node.id} put an error into its answer", node_id=node.id, node_url=node.url
    )


def too_long(node: Node, limit: int) -> NodeProtocolError:
    """Make the error for a node that sends without end."""
    return NodeProtocolError(
        f"{node.id} sent more than {limit} bytes where an answer was expected (max_body_bytes)",
        node_id=node.id,
        node_url=node.url,
    )


def too_long_line(node: Node) -> NodeProtocolError:
    """Make the error for a stream without lines, or of lines that say nothing."""
    return NodeProtocolError(
        f"{node.id} sent a stream without end in which there is no further part of an answer",
        node_id=node.id,
        node_url=node.url,
    )


def no_json(node: Node) -> NodeProtocolError:
    """Make the error for an answer that nobody can read."""
    return NodeProtocolError(
        f"{node.id} answered with something that is no JSON", node_id=node.id, node_url=node.url
    )


def answer_to_refusal(dispatch: Dispatch, response: httpx.Response, body: bytes) -> httpx.Response:
    """A status other than 200: the node's fault raises, the caller's is handed back."""
    node, status = dispatch.node, response.status_code
    error = error_of_answer(node, dispatch.call.model, status, error_text(body), response.headers)
    if error is not None:
        raise error
    dispatch.refused(status)
    return _answer(node, response, httpx.ByteStream(body), {DISPATCH_EXTENSION: dispatch})


def whole_answer(dispatch: Dispatch, response: httpx.Response, data: bytes) -> httpx.Response:
    """A 200 that came in one piece; it may still be an error, or incomplete."""
    node, call = dispatch.node, dispatch.call
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise no_json(node) from None
    if not isinstance(document, dict):
        raise _unclear(node)
    if document.get("error"):
        text = error_text(data)
        raise error_of_answer(node, call.model, -1, text, {}) or _unclear(node)
    if not is_answer(document):
        raise NodeProtocolError(
            f"{node.id} answered with JSON that is no answer of Ollama's",
            node_id=node.id,
            node_url=node.url,
        )
    is_complete, usage = read_whole(document)
    if not is_complete:
        raise dispatch.incomplete(1)
    dispatch.complete(usage)
    extensions = {DISPATCH_EXTENSION: dispatch, DOCUMENT_EXTENSION: document}
    return _answer(node, response, httpx.ByteStream(data), extensions)


def streamed_answer(
    dispatch: Dispatch,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
) -> httpx.Response:
    """A 200 whose first part is good: the rest is on its way."""
    return _answer(dispatch.node, response, stream, {DISPATCH_EXTENSION: dispatch})


def _answer(
    node: Node,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
    extensions: dict[str, Any],
) -> httpx.Response:
    headers = [pair for pair in _headers(node, response) if pair[0].lower() not in _DROPPED_HEADERS]
    return httpx.Response(
        response.status_code, headers=headers, stream=stream, extensions=extensions
    )


def passed_through(
    node: Node,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
) -> httpx.Response:
    """
    An answer to something that is the caller's own business with one node.

    Raises:
        NodeProtocolError: it redirects, which could lead the caller's client to another node,
            or is compressed, and could be far larger than it looks.
    """
    if 300 <= response.status_code < 400:
        raise error_of_answer(node, "", response.status_code, None, {}) or _unclear(node)
    check_encoding(node, response)
    return httpx.Response(
        response.status_code,
        headers=_headers(node, response),
        stream=stream,
        extensions=response.extensions,
    )


def _headers(node: Node, response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """The node's headers as far as they may be handed on, and which node it was."""
    kept = [
        (name, value)
        for name, value in response.headers.raw
        if (lower := name.lower()) not in _WITHHELD_HEADERS and not lower.startswith(_PREFIX)
    ]
    return [*kept, (b"x-hydra-node-id", node.id.encode("ascii", "replace"))]


def checked(node: Node, call: Call, response: httpx.Response, data: bytes) -> httpx.Response:
    """The answer, unless another node may do better."""
    status = response.status_code
    if status != 200:
        error = error_of_answer(node, call.model, status, error_text(data), response.headers)
        # "Not found" is an answer here: it is what the caller asked.
        if error is not None and status != 404:
            raise error
    elif call.route is not Route.ANY:
        check_content_type(node, response)
    return _answer(node, response, httpx.ByteStream(data), {})


def document_of(response: httpx.Response) -> dict[str, Any] | None:
    """The JSON object that an answer in one piece holds; None if it holds none."""
    assert isinstance(response.stream, httpx.ByteStream)
    try:
        document = json.loads(b"".join(response.stream))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def merged(
    call: Call, nodes: list[Node], documents: Iterable[dict[str, Any] | None]
) -> httpx.Response:
    """One catalogue out of those of all nodes."""
    answered = [(n, d) for n, d in zip(nodes, documents, strict=True) if d is not None]
    if not answered:
        raise none_answered(call, [])
    if call.path == "/v1/models":
        return _json(_merged_by_name(answered, "data", "id", {"object": "list"}))
    if call.path == "/api/ps":
        models = [
            {**entry, "hydra_node": node.id}
            for node, document in answered
            for entry in document.get("models") or ()
            if isinstance(entry, dict)
        ]
        return _json({"models": models})
    return _json(_merged_by_name(answered, "models", "name", {}))


def _merged_by_name(
    answered: list[tuple[Node, dict[str, Any]]], key: str, name: str, base: dict[str, Any]
) -> dict[str, Any]:
    entries: dict[str, dict[str, Any]] = {}
    for node, document in answered:
        for entry in document.get(key) or ():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                continue
            canonical = canonical_model_name(entry[name])
            kept = entries.setdefault(canonical, {**entry, "hydra_nodes": []})
            kept["hydra_nodes"].append(node.id)
    return {**base, key: list(entries.values())}


def _json(document: dict[str, Any]) -> httpx.Response:
    data = json.dumps(document).encode()
    headers = {"content-type": "application/json; charset=utf-8"}
    return httpx.Response(200, headers=headers, stream=httpx.ByteStream(data))


def failed_attempt(node: Node, error: NodeError) -> Attempt:
    """Make the record of a try that needed no lease."""
    return Attempt(
        node_id=node.id, node_url=node.url, outcome=error.cause, seconds=0.0, error=str(error)
    )


def none_answered(call: Call, attempts: list[Attempt]) -> AllNodesFailedError:
    """Make the error for a request about the cluster that nobody answered."""
    tried = ", ".join(attempt.error for attempt in attempts) or "no node is up"
    return AllNodesFailedError(
        f"no node answered {call.path}: {tried}", model=call.model, attempts=attempts
    )
