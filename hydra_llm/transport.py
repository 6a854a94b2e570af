"""The router as an httpx transport: anything that speaks HTTP to one Ollama speaks to all.

::

    ollama.Client(transport=HydraTransport(["http://rig:11434", "http://gaming:11434"]))
    openai.OpenAI(
        base_url="http://hydra/v1",
        api_key="unused",
        http_client=httpx.Client(transport=HydraTransport(router=router)),
    )

The sync and the async transport are written out beside each other: what they share is in
:mod:`hydra_llm.dispatch` and :mod:`hydra_llm.replies`; left is waiting and moving bytes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from hydra_llm.cluster import Lease, Waiter
from hydra_llm.config import HydraSettings
from hydra_llm.dispatch import Dispatch, clear_frames, outgoing_request
from hydra_llm.exceptions import (
    ConfigurationError,
    NodeError,
    RoutingError,
    StreamBrokenError,
)
from hydra_llm.ollama.calls import Call, Framing, Route, read_call
from hydra_llm.ollama.continuation import (
    NotContinued,
    Told,
    beginning_of,
    check_call,
    continued,
)
from hydra_llm.ollama.errors import error_of_exception
from hydra_llm.patience import Patience
from hydra_llm.pools import HandshakeGuard
from hydra_llm.replies import (
    DISPATCH_EXTENSION,
    answer_to_refusal,
    check_content_type,
    check_shown,
    checked,
    document_of,
    failed_attempt,
    is_stream,
    merged,
    no_continuation,
    none_answered,
    passed_through,
    render_question,
    streamed_answer,
    too_long,
    whole_answer,
)
from hydra_llm.router import Router, RouterShare, share_of, shared_router
from hydra_llm.scheduling import RoutingDecision
from hydra_llm.streams import AsyncClosingStream, AsyncRoutedStream, ClosingStream, RoutedStream
from hydra_llm.types import Attempt, Node
from hydra_llm.words import RoutingWords, read_words, words_of_headers

WORDS_EXTENSION = "hydra_words"
"""Request extension: routing words, for callers that hold the httpx request."""
PAYLOAD_EXTENSION = "hydra_payload"
"""Request extension: the JSON body as data, so that it need not be parsed again."""
RESTART_EXTENSION = "hydra_restart_of"
"""Request extension: the :class:`StreamBrokenError` in which the same request ended before."""


def decision_of(response: httpx.Response) -> RoutingDecision | None:
    """
    The decision behind a response of one of the transports.

    None where nothing was decided (a catalogue, a request about one named node). Of a stream
    it is complete once the last part has been read.
    """
    dispatch = response.extensions.get(DISPATCH_EXTENSION)
    return dispatch.decision() if isinstance(dispatch, Dispatch) else None


MAX_ERROR_BYTES = 1024 * 1024


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
        if router is not None and settings is not None:
            raise ConfigurationError("settings are those of the router that is given")
        self._words = read_words(routing)
        if router is None:
            self._share: RouterShare | None = shared_router(nodes, settings=settings)
            self._router = self._share.router
        else:
            self._share = share_of(router)
            self._router = router

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self._router

    def _planned(
        self,
        path: str,
        payload: Mapping[str, Any],
        among: Iterable[str] | None,
        routing: Mapping[str, Any],
    ) -> Dispatch:
        """A request that is to come, known well enough to choose a node for it."""
        call = read_call("POST", path, payload)
        if call.route is not Route.INFERENCE or not call.model:
            raise ConfigurationError(
                f"{path} of {call.model!r} is nothing that a node is chosen for"
            )
        words = read_words(routing, defaults=self._words)
        return Dispatch(self._router, call, words, b"", among=among)

    def _bound(self, request: httpx.Request, dispatch: Dispatch, body: bytes) -> Dispatch:
        if not dispatch.is_held:
            raise ConfigurationError("this place on a node was given back; reserve another")
        dispatch.bind(self._read(request, body), body)
        return dispatch

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

    def _new_dispatch(
        self, request: httpx.Request, call: Call, words: RoutingWords, body: bytes
    ) -> Dispatch:
        broken = request.extensions.get(RESTART_EXTENSION)
        if broken is not None and not isinstance(broken, StreamBrokenError):
            raise ConfigurationError("restart_of should be a StreamBrokenError")
        return Dispatch(self._router, call, words, body, restart_of=broken)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._router!r}>"


class HydraTransport(_Base, httpx.BaseTransport):
    """
    The sync transport.

    Args:
        nodes: as for :class:`Router`; clients of the same nodes share one router.
        router: one that exists already; it is not closed with the transport. One that other
            clients share is held open by this one too.
        settings: for a router made here.
        routing: routing words for every request; headers ``x-hydra-node-id`` and so on, or
            the request extension ``hydra_words``, say them for one.
    """

    def reserve(
        self,
        path: str,
        payload: Mapping[str, Any],
        *,
        among: Iterable[str] | None = None,
        **routing: Any,
    ) -> Dispatch:
        """
        Choose a node for a request that somebody else puts together, and hold a place there.

        For programs that choose first and send later. Send it through this transport with the
        request extension ``hydra_dispatch``: that is one attempt, on that node; should it fail,
        :meth:`reserve_again` finds the next one. A place that is not needed has to be put back
        with :meth:`Dispatch.put_back`.

        Args:
            path: where the request will go, e.g. ``/api/chat``.
            payload: what is known of its JSON body, ``model`` at least.
            among: ids of the only nodes that may serve it; all by default.
            routing: routing words.

        Raises:
            RoutingError: no node can take it.
            RoutingWordError: a word is misspelt or its value is wrong.
        """
        dispatch = self._planned(path, payload, among, routing)
        self._router.wait_until_seen()
        self._lease(dispatch)
        return dispatch

    def reserve_again(self, dispatch: Dispatch) -> None:
        """Hold a place on the next node, after the one before has failed."""
        self._lease(dispatch)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Route one request. Raises the errors of :mod:`hydra_llm.exceptions`."""
        router = self._router
        reserved = request.extensions.get(DISPATCH_EXTENSION)
        if reserved is not None:
            return self._once(request, self._bound(request, reserved, request.read()))
        words = self._words_of(request)
        router.wait_until_seen()
        if not _has_json_body(request):
            return self._forward(request, self._read(request, b""), words, None)
        body = request.read()
        call = self._read(request, body)
        if call.route is Route.INFERENCE and call.model:
            return self._dispatch(request, self._new_dispatch(request, call, words, body))
        return self._forward(request, call, words, body)

    # ---------------------------------------------------------------- inference

    def _dispatch(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        while True:
            self._lease(dispatch)
            with suppress(NodeError):  # the next one, then
                return self._once(request, dispatch)

    def _once(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        """One attempt, on the node that a place is held on."""
        try:
            return self._attempt(request, dispatch)
        except NodeError as error:
            clear_frames(error)
            dispatch.failed(error)
            raise
        except BaseException:
            dispatch.cancelled()
            raise

    def _lease(self, dispatch: Dispatch) -> Lease:
        lease = self._turn(dispatch, dispatch.acquire())
        while (claim := dispatch.claim()) is not None and not claim.wait():
            lease = self._turn(dispatch, dispatch.choose_again())
        return lease

    def _turn(self, dispatch: Dispatch, held: Lease | Waiter) -> Lease:
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
                return answer_to_refusal(dispatch, response, body)
            check_content_type(node, response)
            patience = _patience(dispatch, request, outgoing)
            if call.framing is Framing.JSON or not is_stream(response):
                limit = self._router.settings.max_body_bytes
                return whole_answer(dispatch, response, _read_limited(node, response, limit))
            stream = RoutedStream(
                dispatch, response, patience, functools.partial(self._resume, request, dispatch)
            )
            stream.open()
        except BaseException:
            response.close()
            raise
        return streamed_answer(dispatch, response, stream)

    def _resume(
        self, request: httpx.Request, dispatch: Dispatch, told: Told
    ) -> tuple[httpx.Response, Patience, str]:
        """
        Another node goes on with a broken stream. Raises NotContinued and NodeError.

        Its answer, the patience for its parts, and the beginning that it was given.
        """
        check_call(dispatch.call, told)
        payload = continued(dispatch.call, told)
        beginning = beginning_of(dispatch.call, told, payload)
        try:
            self._lease(dispatch)
        except RoutingError as refusal:
            raise NotContinued(str(refusal)) from refusal
        node = dispatch.node
        dispatch.continue_with(payload)
        outgoing = dispatch.outgoing(request)
        if beginning:
            question = render_question(node, request, outgoing)
            response = _send(self._router, node, question)
            shown = _read_limited(node, response, MAX_ERROR_BYTES)
            check_shown(dispatch, response, shown, beginning)
            outgoing = dispatch.outgoing(request)
        response = _send(self._router, node, outgoing)
        try:
            if response.status_code != 200 or not is_stream(response):
                body = _read_limited(node, response, MAX_ERROR_BYTES)
                raise no_continuation(dispatch, response, body)
        except BaseException:
            response.close()
            raise
        return response, _patience(dispatch, request, outgoing), beginning

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
                    return _passed(self._router, node, response)
                data = _read_limited(node, response, self._router.settings.max_body_bytes)
                return checked(node, call, response, data)
            except NodeError as error:
                attempts.append(failed_attempt(node, error))
                if call.route is Route.ADMIN:
                    raise
                last = error
        raise none_answered(call, attempts) from last

    def _catalogue(self, request: httpx.Request, call: Call, words: RoutingWords) -> httpx.Response:
        nodes = _nodes_for(self._router, call, words)

        def ask(node: Node) -> dict[str, Any] | None:
            outgoing = outgoing_request(node, request, b"", _brief(self._router))
            try:
                response = _send(self._router, node, outgoing)
                data = _read_limited(node, response, self._router.settings.max_body_bytes)
                return document_of(checked(node, call, response, data))
            except NodeError:
                return None

        with ThreadPoolExecutor(min(8, len(nodes)), "hydra-llm-catalogue") as workers:
            documents = list(workers.map(ask, nodes))
        return merged(call, nodes, documents)

    def close(self) -> None:
        """Give the router back; it closes if nobody else uses it."""
        if self._share is not None:
            self._share.close()


class AsyncHydraTransport(_Base, httpx.AsyncBaseTransport):
    """The async transport; arguments as for :class:`HydraTransport`."""

    async def reserve(
        self,
        path: str,
        payload: Mapping[str, Any],
        *,
        among: Iterable[str] | None = None,
        **routing: Any,
    ) -> Dispatch:
        """As :meth:`HydraTransport.reserve`, without blocking the event loop."""
        dispatch = self._planned(path, payload, among, routing)
        await self._router.await_until_seen()
        await self._lease(dispatch)
        return dispatch

    async def reserve_again(self, dispatch: Dispatch) -> None:
        """Hold a place on the next node, after the one before has failed."""
        await self._lease(dispatch)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Route one request. Raises the errors of :mod:`hydra_llm.exceptions`."""
        router = self._router
        reserved = request.extensions.get(DISPATCH_EXTENSION)
        if reserved is not None:
            return await self._once(request, self._bound(request, reserved, await request.aread()))
        words = self._words_of(request)
        await router.await_until_seen()
        if not _has_json_body(request):
            return await self._forward(request, self._read(request, b""), words, None)
        body = await request.aread()
        call = self._read(request, body)
        if call.route is Route.INFERENCE and call.model:
            return await self._dispatch(request, self._new_dispatch(request, call, words, body))
        return await self._forward(request, call, words, body)

    # ---------------------------------------------------------------- inference

    async def _dispatch(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        while True:
            await self._lease(dispatch)
            with suppress(NodeError):  # the next one, then
                return await self._once(request, dispatch)

    async def _once(self, request: httpx.Request, dispatch: Dispatch) -> httpx.Response:
        try:
            return await self._attempt(request, dispatch)
        except NodeError as error:
            clear_frames(error)
            dispatch.failed(error)
            raise
        except BaseException:
            dispatch.cancelled()
            raise

    async def _lease(self, dispatch: Dispatch) -> Lease:
        lease = await self._turn(dispatch, dispatch.acquire())
        while (claim := dispatch.claim()) is not None and not await claim.wait_async():
            lease = await self._turn(dispatch, dispatch.choose_again())
        return lease

    async def _turn(self, dispatch: Dispatch, held: Lease | Waiter) -> Lease:
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
                return answer_to_refusal(dispatch, response, body)
            check_content_type(node, response)
            patience = _patience(dispatch, request, outgoing)
            if call.framing is Framing.JSON or not is_stream(response):
                limit = self._router.settings.max_body_bytes
                data = await _aread_limited(node, response, limit)
                return whole_answer(dispatch, response, data)
            stream = AsyncRoutedStream(
                dispatch, response, patience, functools.partial(self._resume, request, dispatch)
            )
            await stream.open()
        except BaseException:
            await response.aclose()
            raise
        return streamed_answer(dispatch, response, stream)

    async def _resume(
        self, request: httpx.Request, dispatch: Dispatch, told: Told
    ) -> tuple[httpx.Response, Patience, str]:
        """As for the sync one."""
        check_call(dispatch.call, told)
        payload = continued(dispatch.call, told)
        beginning = beginning_of(dispatch.call, told, payload)
        try:
            await self._lease(dispatch)
        except RoutingError as refusal:
            raise NotContinued(str(refusal)) from refusal
        node = dispatch.node
        dispatch.continue_with(payload)
        outgoing = dispatch.outgoing(request)
        if beginning:
            question = render_question(node, request, outgoing)
            response = await _asend(self._router, node, question)
            shown = await _aread_limited(node, response, MAX_ERROR_BYTES)
            check_shown(dispatch, response, shown, beginning)
            outgoing = dispatch.outgoing(request)
        response = await _asend(self._router, node, outgoing)
        try:
            if response.status_code != 200 or not is_stream(response):
                body = await _aread_limited(node, response, MAX_ERROR_BYTES)
                raise no_continuation(dispatch, response, body)
        except BaseException:
            await response.aclose()
            raise
        return response, _patience(dispatch, request, outgoing), beginning

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
                    return await _apassed(self._router, node, response)
                data = await _aread_limited(node, response, self._router.settings.max_body_bytes)
                return checked(node, call, response, data)
            except NodeError as error:
                attempts.append(failed_attempt(node, error))
                if call.route is Route.ADMIN:
                    raise
                last = error
        raise none_answered(call, attempts) from last

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
                return document_of(checked(node, call, response, data))
            except NodeError:
                return None

        documents = await asyncio.gather(*(ask(node) for node in nodes))
        return merged(call, nodes, documents)

    async def aclose(self) -> None:
        """Give the router back; it closes if nobody else uses it."""
        if self._share is not None:
            await self._share.aclose()


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
                raise too_long(node, limit)
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
                raise too_long(node, limit)
    except httpx.HTTPError as exc:
        raise error_of_exception(node, exc) from exc
    finally:
        await response.aclose()
    return bytes(data)


def _passed(router: Router, node: Node, response: httpx.Response) -> httpx.Response:
    """An answer that goes to the caller as it comes; one in one piece no further than its limit."""
    limit = None if is_stream(response) else router.settings.max_body_bytes
    try:
        return passed_through(node, response, ClosingStream(node, response, limit))
    except BaseException:
        response.close()
        raise


async def _apassed(router: Router, node: Node, response: httpx.Response) -> httpx.Response:
    """As :func:`_passed`, for an event loop."""
    limit = None if is_stream(response) else router.settings.max_body_bytes
    try:
        return passed_through(node, response, AsyncClosingStream(node, response, limit))
    except BaseException:
        await response.aclose()
        raise


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


# --------------------------------------------------------------------- small choices


def _has_json_body(request: httpx.Request) -> bool:
    """Everything but GET and uploads of model files (which may be gigabytes)."""
    if request.method in ("GET", "HEAD"):
        return False
    return not request.url.path.startswith("/api/blobs/")


def _nodes_for(router: Router, call: Call, words: RoutingWords) -> list[Node]:
    if call.route is Route.ADMIN and words.node_id is None:
        known = ", ".join(node.id for node in router.nodes())
        raise ConfigurationError(
            f"{call.method} {call.path} changes one node: say which with node_id=... ({known})"
        )
    return router._nodes_in_order(call, words)


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


def _patience(dispatch: Dispatch, request: httpx.Request, outgoing: httpx.Request) -> Patience:
    """From the headers on, a node is waited for as its parts come."""
    timeouts = outgoing.extensions["timeout"]
    patience = dispatch.patience(request)
    patience.ends_with(timeouts["read"])
    timeouts["read"] = patience
    return patience


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
