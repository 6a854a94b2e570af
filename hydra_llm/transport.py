"""The router as an httpx transport: anything that speaks HTTP to one Ollama speaks to all.

::

    ollama.Client(transport=HydraTransport(["http://rig:11434", "http://gaming:11434"]))
    openai.OpenAI(
        base_url="http://hydra/v1",
        api_key="unused",
        http_client=httpx.Client(transport=HydraTransport(router=router)),
    )

The sync and the async transport are written out beside each other: what they share is in
:mod:`hydra_llm.dispatch`, what is left is waiting and moving bytes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from hydra_llm.cluster import Lease, Waiter
from hydra_llm.config import HydraSettings
from hydra_llm.dispatch import Dispatch, outgoing_request
from hydra_llm.exceptions import (
    AllNodesFailedError,
    ConfigurationError,
    NodeError,
    NodeProtocolError,
)
from hydra_llm.ollama.answers import AnswerReader, error_text, is_answer, read_whole
from hydra_llm.ollama.calls import Call, Framing, Route, read_call
from hydra_llm.ollama.errors import error_of_answer, error_of_exception
from hydra_llm.pools import HandshakeGuard
from hydra_llm.router import Router, shared_router
from hydra_llm.scheduling import RoutingDecision
from hydra_llm.types import Attempt, Node, canonical_model_name
from hydra_llm.words import RoutingWords, read_words, words_of_headers

WORDS_EXTENSION = "hydra_words"
"""Request extension: routing words, for callers that hold the httpx request."""
PAYLOAD_EXTENSION = "hydra_payload"
"""Request extension: the JSON body as data, so that it need not be parsed again."""
DISPATCH_EXTENSION = "hydra_dispatch"
"""Response extension: the :class:`Dispatch`, whose ``decision()`` explains."""
DOCUMENT_EXTENSION = "hydra_document"
"""Response extension: the parsed JSON of an answer that came in one piece."""


def decision_of(response: httpx.Response) -> RoutingDecision | None:
    """
    The decision behind a response of one of the transports.

    None where nothing was decided (a catalogue, a request about one named node). Of a stream
    it is complete once the last part has been read.
    """
    dispatch = response.extensions.get(DISPATCH_EXTENSION)
    return dispatch.decision() if isinstance(dispatch, Dispatch) else None


MAX_ERROR_BYTES = 1024 * 1024

_DROPPED_HEADERS = frozenset({"content-length", "content-encoding", "transfer-encoding"})


class _Base:
    """What both transports are made of."""

    def __init__(
        self,
        nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None = None,
        *,
        router: Router | None = None,
        settings: HydraSettings | None = None,
        **routing: Any,
    ) -> None:
        if router is not None and nodes is not None:
            raise ConfigurationError("give either nodes or router, not both")
        self._words = read_words(routing)
        self._share = None if router is not None else shared_router(nodes, settings=settings)
        if router is not None:
            self._router = router
        else:
            assert self._share is not None
            self._router = self._share.router

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self._router

    def _read(self, request: httpx.Request, body: bytes) -> Call:
        payload = request.extensions.get(PAYLOAD_EXTENSION)
        if payload is None and body:
            try:
                payload = json.loads(body)
            except (ValueError, RecursionError):
                payload = None
        path = request.url.path
        return read_call(request.method, path, payload if isinstance(payload, dict) else None)

    def _words_of(self, request: httpx.Request) -> RoutingWords:
        given = request.extensions.get(WORDS_EXTENSION)
        if given is None:
            given = words_of_headers(request.headers.items())
        return read_words(given, defaults=self._words) if given else self._words

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._router!r}>"


class HydraTransport(_Base, httpx.BaseTransport):
    """
    The sync transport.

    Args:
        nodes: as for :class:`Router`; clients of the same nodes share one router.
        router: one that exists already; it is not closed with the transport.
        settings: for a router made here.
        routing: routing words for every request; headers ``x-hydra-node-id`` and so on, or
            the request extension ``hydra_words``, say them for one.
    """

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Route one request. Raises the errors of :mod:`hydra_llm.exceptions`."""
        router = self._router
        words = self._words_of(request)
        router.wait_until_seen()
        if not _has_json_body(request):
            return self._forward(request, self._read(request, b""), words, None)
        body = request.read()
        call = self._read(request, body)
        if call.route is Route.INFERENCE and call.model:
            return self._dispatch(request, Dispatch(router, call, words, body))
        return self._forward(request, call, words, body)

    # ---------------------------------------------------------------- inference

    def _dispatch(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        while True:
            self._lease(dispatch)
            try:
                return self._attempt(request, dispatch)
            except NodeError as error:
                dispatch.failed(error)
            except BaseException:
                dispatch.cancelled()
                raise

    def _lease(self, dispatch: Dispatch) -> Lease:
        held = dispatch.acquire()
        if isinstance(held, Lease):
            return held
        ready = threading.Event()
        held.on_ready(ready.set)
        try:
            in_time = ready.wait(dispatch.seconds_left())
        except BaseException:
            dispatch.withdraw(held)
            raise
        if not in_time:
            dispatch.withdraw(held)
            raise dispatch.out_of_time()
        return dispatch.outcome_of(held)

    def _attempt(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        node, call = dispatch.node, dispatch.call
        outgoing = dispatch.outgoing(request)
        response = _send(self._router, node, outgoing)
        try:
            if response.status_code != 200:
                body = _read_limited(node, response, MAX_ERROR_BYTES)
                return _answer_to_refusal(dispatch, response, body)
            _check_content_type(node, response)
            outgoing.extensions["timeout"]["read"] = dispatch.idle_timeout(request)
            if call.framing is Framing.JSON or not _is_stream(response):
                limit = self._router.settings.max_body_bytes
                return _whole_answer(dispatch, response, _read_limited(node, response, limit))
            stream = _RoutedStream(dispatch, response)
            stream.open()
        except BaseException:
            response.close()
            raise
        return _streamed_answer(dispatch, response, stream)

    # ------------------------------------------------------------- other routes

    def _forward(
        self, request: httpx.Request, call: Call, words: RoutingWords, body: bytes | None
    ) -> httpx.Response:
        """Requests that need no scheduling: about a model, a node, or the whole cluster."""
        if call.route is Route.CATALOGUE and words.node_id is None:
            return self._catalogue(request, call, words)
        nodes = _nodes_for(self._router, call, words)
        attempts: list[Attempt] = []
        last: NodeError | None = None
        for node in nodes:
            payload = body if body is not None else _sync_stream(request)
            outgoing = outgoing_request(node, request, payload, _patient(self._router, request))
            try:
                response = _send(self._router, node, outgoing)
                if call.route is Route.ADMIN:
                    return _passed_through(node, response, _ClosingStream(node, response))
                data = _read_limited(node, response, self._router.settings.max_body_bytes)
                return _checked(node, call, response, data)
            except NodeError as error:
                attempts.append(_failed_attempt(node, error))
                if call.route is Route.ADMIN:
                    raise
                last = error
        raise _none_answered(call, attempts) from last

    def _catalogue(self, request: httpx.Request, call: Call, words: RoutingWords) -> httpx.Response:
        nodes = _nodes_for(self._router, call, words)

        def ask(node: Node) -> dict[str, Any] | None:
            outgoing = outgoing_request(node, request, b"", _brief(self._router))
            try:
                response = _send(self._router, node, outgoing)
                data = _read_limited(node, response, self._router.settings.max_body_bytes)
                return _document(_checked(node, call, response, data))
            except NodeError:
                return None

        with ThreadPoolExecutor(min(8, len(nodes)), "hydra-llm-catalogue") as workers:
            documents = list(workers.map(ask, nodes))
        return _merged(call, nodes, documents)

    def close(self) -> None:
        """Give the router back; it closes if nobody else uses it."""
        if self._share is not None:
            self._share.close()


class AsyncHydraTransport(_Base, httpx.AsyncBaseTransport):
    """The async transport; arguments as for :class:`HydraTransport`."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Route one request. Raises the errors of :mod:`hydra_llm.exceptions`."""
        router = self._router
        words = self._words_of(request)
        await router.await_until_seen()
        if not _has_json_body(request):
            return await self._forward(request, self._read(request, b""), words, None)
        body = await request.aread()
        call = self._read(request, body)
        if call.route is Route.INFERENCE and call.model:
            return await self._dispatch(request, Dispatch(router, call, words, body))
        return await self._forward(request, call, words, body)

    # ---------------------------------------------------------------- inference

    async def _dispatch(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        while True:
            await self._lease(dispatch)
            try:
                return await self._attempt(request, dispatch)
            except NodeError as error:
                dispatch.failed(error)
            except BaseException:
                dispatch.cancelled()
                raise

    async def _lease(self, dispatch: Dispatch) -> Lease:
        held = dispatch.acquire()
        if isinstance(held, Lease):
            return held
        try:
            await asyncio.wait_for(_until_ready(held), dispatch.seconds_left())
        except asyncio.TimeoutError:
            dispatch.withdraw(held)
            raise dispatch.out_of_time() from None
        except BaseException:
            dispatch.withdraw(held)
            raise
        return dispatch.outcome_of(held)

    async def _attempt(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        node, call = dispatch.node, dispatch.call
        outgoing = dispatch.outgoing(request)
        response = await _asend(self._router, node, outgoing)
        try:
            if response.status_code != 200:
                body = await _aread_limited(node, response, MAX_ERROR_BYTES)
                return _answer_to_refusal(dispatch, response, body)
            _check_content_type(node, response)
            outgoing.extensions["timeout"]["read"] = dispatch.idle_timeout(request)
            if call.framing is Framing.JSON or not _is_stream(response):
                limit = self._router.settings.max_body_bytes
                data = await _aread_limited(node, response, limit)
                return _whole_answer(dispatch, response, data)
            stream = _AsyncRoutedStream(dispatch, response)
            await stream.open()
        except BaseException:
            await response.aclose()
            raise
        return _streamed_answer(dispatch, response, stream)

    # ------------------------------------------------------------- other routes

    async def _forward(
        self, request: httpx.Request, call: Call, words: RoutingWords, body: bytes | None
    ) -> httpx.Response:
        """Requests that need no scheduling: about a model, a node, or the whole cluster."""
        if call.route is Route.CATALOGUE and words.node_id is None:
            return await self._catalogue(request, call, words)
        nodes = _nodes_for(self._router, call, words)
        attempts: list[Attempt] = []
        last: NodeError | None = None
        for node in nodes:
            payload = body if body is not None else _async_stream(request)
            outgoing = outgoing_request(node, request, payload, _patient(self._router, request))
            try:
                response = await _asend(self._router, node, outgoing)
                if call.route is Route.ADMIN:
                    return _passed_through(node, response, _AsyncClosingStream(node, response))
                data = await _aread_limited(node, response, self._router.settings.max_body_bytes)
                return _checked(node, call, response, data)
            except NodeError as error:
                attempts.append(_failed_attempt(node, error))
                if call.route is Route.ADMIN:
                    raise
                last = error
        raise _none_answered(call, attempts) from last

    async def _catalogue(
        self, request: httpx.Request, call: Call, words: RoutingWords
    ) -> httpx.Response:
        nodes = _nodes_for(self._router, call, words)

        async def ask(node: Node) -> dict[str, Any] | None:
            outgoing = outgoing_request(node, request, b"", _brief(self._router))
            try:
                response = await _asend(self._router, node, outgoing)
                limit = self._router.settings.max_body_bytes
                data = await _aread_limited(node, response, limit)
                return _document(_checked(node, call, response, data))
            except NodeError:
                return None

        documents = await asyncio.gather(*(ask(node) for node in nodes))
        return _merged(call, nodes, documents)

    async def aclose(self) -> None:
        """Give the router back; it closes if nobody else uses it."""
        if self._share is not None:
            await self._share.aclose()


# ------------------------------------------------------------------------ streams


class _RoutedStream(httpx.SyncByteStream):
    """An answer on its way to the caller; owns the lease until it is closed."""

    def __init__(self, dispatch: Dispatch, response: httpx.Response) -> None:
        self._dispatch = dispatch
        self._response = response
        assert isinstance(response.stream, httpx.SyncByteStream)
        self._source = iter(response.stream)
        self._reader = AnswerReader(dispatch.call.framing)
        self._held: list[bytes] = []

    def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._reader.parts:
            data = self._next()
            if data is None:
                self._reader.end()
                _check_opening(self._dispatch, self._reader, ended=True)
                break
            self._reader.feed(data)
            self._held.append(data)
        _check_opening(self._dispatch, self._reader, ended=False)
        self._dispatch.first_byte()

    def _next(self) -> bytes | None:
        try:
            return next(self._source, None)
        except httpx.HTTPError as exc:
            raise error_of_exception(self._dispatch.node, exc) from exc

    def __iter__(self) -> Iterator[bytes]:
        dispatch, reader = self._dispatch, self._reader
        received = dispatch.lease.renew_at(dispatch.clock)
        for data in self._held:
            if reader.is_complete:
                dispatch.complete(reader.usage)
            yield data
        self._held.clear()
        while True:
            before = reader.parts
            try:
                part = self._next()
                if part is None:
                    reader.end()
                else:
                    reader.feed(part)
                if part is None or reader.error is not None or reader.is_too_long:
                    _check_part(dispatch, reader, ended=part is None)
            except NodeError as error:
                self._response.close()
                raise dispatch.broken(error, before) from None
            if reader.is_complete:
                dispatch.complete(reader.usage)
            if part is None:
                return
            received()
            yield part

    def close(self) -> None:
        """Let go of the node: the connection is kept if the answer was complete."""
        if self._reader.is_complete:
            self._dispatch.complete(self._reader.usage)
            # What is left is the end of the chunked body; unread it costs the connection.
            with suppress(httpx.HTTPError):
                next(self._source, None)
        else:
            self._dispatch.cancelled()
        self._response.close()


class _AsyncRoutedStream(httpx.AsyncByteStream):
    """As :class:`_RoutedStream`, for an event loop."""

    def __init__(self, dispatch: Dispatch, response: httpx.Response) -> None:
        self._dispatch = dispatch
        self._response = response
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._source = response.stream.__aiter__()
        self._reader = AnswerReader(dispatch.call.framing)
        self._held: list[bytes] = []

    async def open(self) -> None:
        """Read on until the first part is whole; an error before that is not committed."""
        while not self._reader.parts:
            data = await self._next()
            if data is None:
                self._reader.end()
                _check_opening(self._dispatch, self._reader, ended=True)
                break
            self._reader.feed(data)
            self._held.append(data)
        _check_opening(self._dispatch, self._reader, ended=False)
        self._dispatch.first_byte()

    async def _next(self) -> bytes | None:
        try:
            return await self._source.__anext__()
        except StopAsyncIteration:
            return None
        except httpx.HTTPError as exc:
            raise error_of_exception(self._dispatch.node, exc) from exc

    async def __aiter__(self) -> AsyncIterator[bytes]:
        dispatch, reader = self._dispatch, self._reader
        received = dispatch.lease.renew_at(dispatch.clock)
        for data in self._held:
            if reader.is_complete:
                dispatch.complete(reader.usage)
            yield data
        self._held.clear()
        while True:
            before = reader.parts
            try:
                part = await self._next()
                if part is None:
                    reader.end()
                else:
                    reader.feed(part)
                if part is None or reader.error is not None or reader.is_too_long:
                    _check_part(dispatch, reader, ended=part is None)
            except NodeError as error:
                await self._response.aclose()
                raise dispatch.broken(error, before) from None
            if reader.is_complete:
                dispatch.complete(reader.usage)
            if part is None:
                return
            received()
            yield part

    async def aclose(self) -> None:
        """Let go of the node: the connection is kept if the answer was complete."""
        if self._reader.is_complete:
            self._dispatch.complete(self._reader.usage)
            # What is left is the end of the chunked body; unread it costs the connection.
            with suppress(StopAsyncIteration, httpx.HTTPError):
                await self._source.__anext__()
        else:
            self._dispatch.cancelled()
        await self._response.aclose()


class _ClosingStream(httpx.SyncByteStream):
    """Bytes handed through; httpx's errors become ours."""

    def __init__(self, node: Node, response: httpx.Response) -> None:
        self._node = node
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._response.stream, httpx.SyncByteStream)
        try:
            yield from self._response.stream
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    def close(self) -> None:
        self._response.close()


class _AsyncClosingStream(httpx.AsyncByteStream):
    """As :class:`_ClosingStream`, for an event loop."""

    def __init__(self, node: Node, response: httpx.Response) -> None:
        self._node = node
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        try:
            async for data in self._response.stream:
                yield data
        except httpx.HTTPError as exc:
            raise error_of_exception(self._node, exc) from exc

    async def aclose(self) -> None:
        await self._response.aclose()


# ------------------------------------------------------------------ bytes in & out


def _send(router: Router, node: Node, outgoing: httpx.Request) -> httpx.Response:
    try:
        return router._pools.sync().handle_request(outgoing)
    except httpx.HTTPError as exc:
        raise error_of_exception(node, exc) from exc


async def _asend(router: Router, node: Node, outgoing: httpx.Request) -> httpx.Response:
    pool = await router._pools.of_this_loop()
    if outgoing.url.scheme == "https":
        outgoing.extensions["trace"] = HandshakeGuard()
    try:
        return await pool.handle_async_request(outgoing)
    except httpx.HTTPError as exc:
        raise error_of_exception(node, exc) from exc


def _read_limited(node: Node, response: httpx.Response, limit: int) -> bytes:
    """The whole body; closes the response."""
    assert isinstance(response.stream, httpx.SyncByteStream)
    data = bytearray()
    try:
        for chunk in response.stream:
            data += chunk
            if len(data) > limit:
                raise _too_long(node, limit)
    except httpx.HTTPError as exc:
        raise error_of_exception(node, exc) from exc
    finally:
        response.close()
    return bytes(data)


async def _aread_limited(node: Node, response: httpx.Response, limit: int) -> bytes:
    """As :func:`_read_limited`, for an event loop."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    data = bytearray()
    try:
        async for chunk in response.stream:
            data += chunk
            if len(data) > limit:
                raise _too_long(node, limit)
    except httpx.HTTPError as exc:
        raise error_of_exception(node, exc) from exc
    finally:
        await response.aclose()
    return bytes(data)


async def _until_ready(waiter: Waiter) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    waiter.on_ready(lambda: _call_soon(loop, wake))
    await ready


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    # A loop may have been closed with the request still in the line.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


# ----------------------------------------------------------------- pure decisions


def _has_json_body(request: httpx.Request) -> bool:
    """Everything but GET and uploads of model files (which may be gigabytes)."""
    if request.method in ("GET", "HEAD"):
        return False
    return not request.url.path.startswith("/api/blobs/")


def _check_content_type(node: Node, response: httpx.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise NodeProtocolError(
            f"{node.id} compressed its answer unasked; switch that off in the proxy before it",
            node_id=node.id,
            node_url=node.url,
        )
    kind = response.headers.get("content-type", "")
    if kind and not any(word in kind for word in ("json", "event-stream")):
        raise NodeProtocolError(
            f"{node.id} answered with {kind.partition(';')[0][:60]!r}, not with JSON; "
            "is another server listening there?",
            node_id=node.id,
            node_url=node.url,
        )


def _is_stream(response: httpx.Response) -> bool:
    """Load-only and unload requests are answered in one piece, even if a stream was asked for."""
    kind = response.headers.get("content-type", "")
    return "ndjson" in kind or "event-stream" in kind


def _check_opening(dispatch: Dispatch, reader: AnswerReader, *, ended: bool) -> None:
    """Raise if the first part of a stream is no answer."""
    _check_part(dispatch, reader, ended=ended and not reader.parts)


def _check_part(dispatch: Dispatch, reader: AnswerReader, *, ended: bool) -> None:
    node = dispatch.node
    if reader.is_too_long:
        raise _too_long(node, len(reader.rest))
    if reader.error is not None:
        error = error_of_answer(node, dispatch.call.model, -1, reader.error, {})
        raise error or _unclear(node)
    if ended and not reader.is_complete:
        raise dispatch.incomplete(reader.parts)


def _unclear(node: Node) -> NodeProtocolError:
    return NodeProtocolError(
        f"{node.id} put an error into its answer", node_id=node.id, node_url=node.url
    )


def _too_long(node: Node, limit: int) -> NodeProtocolError:
    return NodeProtocolError(
        f"{node.id} sent more than {limit} bytes where an answer was expected (max_body_bytes)",
        node_id=node.id,
        node_url=node.url,
    )


def _answer_to_refusal(dispatch: Dispatch, response: httpx.Response, body: bytes) -> httpx.Response:
    """A status other than 200: the node's fault raises, the caller's is handed back."""
    node, status = dispatch.node, response.status_code
    error = error_of_answer(node, dispatch.call.model, status, error_text(body), response.headers)
    if error is not None:
        raise error
    dispatch.refused(status)
    return _answer(node, response, httpx.ByteStream(body), {DISPATCH_EXTENSION: dispatch})


def _whole_answer(dispatch: Dispatch, response: httpx.Response, data: bytes) -> httpx.Response:
    """A 200 that came in one piece; it may still be an error, or incomplete."""
    node, call = dispatch.node, dispatch.call
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise NodeProtocolError(
            f"{node.id} answered with something that is no JSON", node_id=node.id, node_url=node.url
        ) from None
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


def _streamed_answer(
    dispatch: Dispatch,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
) -> httpx.Response:
    return _answer(dispatch.node, response, stream, {DISPATCH_EXTENSION: dispatch})


def _answer(
    node: Node,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
    extensions: dict[str, Any],
) -> httpx.Response:
    headers = [
        (name, value)
        for name, value in response.headers.raw
        if name.lower().decode("latin-1") not in _DROPPED_HEADERS
    ]
    headers.append((b"x-hydra-node-id", node.id.encode("ascii", "replace")))
    return httpx.Response(
        response.status_code, headers=headers, stream=stream, extensions=extensions
    )


def _passed_through(
    node: Node,
    response: httpx.Response,
    stream: httpx.SyncByteStream | httpx.AsyncByteStream,
) -> httpx.Response:
    """An answer to something that is the caller's own business with one node."""
    headers = [*response.headers.raw, (b"x-hydra-node-id", node.id.encode("ascii", "replace"))]
    return httpx.Response(
        response.status_code, headers=headers, stream=stream, extensions=response.extensions
    )


def _checked(node: Node, call: Call, response: httpx.Response, data: bytes) -> httpx.Response:
    """The answer, unless another node may do better."""
    status = response.status_code
    if status != 200:
        error = error_of_answer(node, call.model, status, error_text(data), response.headers)
        # "Not found" is an answer here: it is what the caller asked.
        if error is not None and status != 404:
            raise error
    elif call.route is not Route.ANY:
        _check_content_type(node, response)
    return _answer(node, response, httpx.ByteStream(data), {})


def _document(response: httpx.Response) -> dict[str, Any] | None:
    assert isinstance(response.stream, httpx.ByteStream)
    try:
        document = json.loads(b"".join(response.stream))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _nodes_for(router: Router, call: Call, words: RoutingWords) -> list[Node]:
    if call.route is Route.ADMIN and words.node_id is None:
        known = ", ".join(node.id for node in router.nodes())
        raise ConfigurationError(
            f"{call.method} {call.path} changes one node: say which with node_id=... ({known})"
        )
    return router._nodes_in_order(call, words)


def _merged(
    call: Call, nodes: list[Node], documents: Iterable[dict[str, Any] | None]
) -> httpx.Response:
    """One catalogue out of those of all nodes."""
    answered = [(n, d) for n, d in zip(nodes, documents, strict=True) if d is not None]
    if not answered:
        raise _none_answered(call, [])
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


def _failed_attempt(node: Node, error: NodeError) -> Attempt:
    return Attempt(
        node_id=node.id, node_url=node.url, outcome=error.cause, seconds=0.0, error=str(error)
    )


def _none_answered(call: Call, attempts: list[Attempt]) -> AllNodesFailedError:
    tried = ", ".join(attempt.error for attempt in attempts) or "no node is up"
    return AllNodesFailedError(
        f"no node answered {call.path}: {tried}", model=call.model, attempts=attempts
    )


def _patient(router: Router, request: httpx.Request) -> dict[str, float | None]:
    """Pulling a model takes what it takes: only the caller limits it."""
    asked = request.extensions.get("timeout") or {}
    connect = asked.get("connect")
    limit = router.settings.connect_timeout
    return {
        "connect": limit if connect is None else min(connect, limit),
        "pool": None,
        "write": asked.get("write"),
        "read": asked.get("read"),
    }


def _brief(router: Router) -> dict[str, float | None]:
    limit = router.settings.health_check_timeout
    return {"connect": limit, "pool": None, "write": limit, "read": limit}


def _sync_stream(request: httpx.Request) -> httpx.SyncByteStream | bytes:
    stream = request.stream
    return stream if isinstance(stream, httpx.SyncByteStream) else b""


def _async_stream(request: httpx.Request) -> httpx.AsyncByteStream | bytes:
    stream = request.stream
    return stream if isinstance(stream, httpx.AsyncByteStream) else b""


__all__ = ["AsyncHydraTransport", "HydraTransport", "decision_of"]
