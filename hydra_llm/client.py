"""Drop-ins for ``ollama.Client`` and ``ollama.AsyncClient`` over several nodes.

::

    from hydra_llm import Client

    client = Client(["http://rig:11434", "http://gaming:11434"])
    answer = client.chat("llama3.2", [{"role": "user", "content": "Why is the sky blue?"}])
    print(answer.message.content)
    print(answer["routing_decision"]["reason"])

They are subclasses: verbs, arguments and types are those of the ``ollama`` package. Every
verb takes the routing words too, and answers carry ``routing_decision``, ``node_id`` and
``node_url``; of a stream, the last part does.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import httpx
import ollama
from pydantic import BaseModel, PlainSerializer

from hydra_llm.config import HydraSettings
from hydra_llm.dispatch import AUTHORIZATION_EXTENSION, Dispatch, encode
from hydra_llm.exceptions import (
    ConfigurationError,
    NodeError,
    NodeProtocolError,
    NoEligibleNodeError,
    RoutingWordError,
    StreamBrokenError,
)
from hydra_llm.ollama.answers import MAX_LINE_BYTES
from hydra_llm.replies import DISPATCH_EXTENSION, DOCUMENT_EXTENSION
from hydra_llm.router import Router
from hydra_llm.scheduling import RoutingDecision
from hydra_llm.scheduling.filters import MODEL_MISSING
from hydra_llm.transport import (
    PAYLOAD_EXTENSION,
    RESTART_EXTENSION,
    WORDS_EXTENSION,
    AsyncHydraTransport,
    HydraTransport,
)
from hydra_llm.types import Node
from hydra_llm.words import WORDS, RoutingWords, split_words, unknown_word

__all__ = [
    "AsyncClient",
    "ChatResponse",
    "Client",
    "EmbedResponse",
    "EmbeddingsResponse",
    "GenerateResponse",
    "NoNodeHasModelError",
]

_T = TypeVar("_T")

# --------------------------------------------------------------------------- types

_Decision = Annotated[Any, PlainSerializer(lambda decision: decision and decision.to_dict())]


class _Routed(BaseModel):
    routing_decision: _Decision = None
    """The :class:`hydra_llm.RoutingDecision`; in a stream only on the last part."""
    node_id: str | None = None
    """The node that answered."""
    node_url: str | None = None
    continued_from: str | None = None
    """Of the first part that another node has written: the node that began the answer."""


class ChatResponse(_Routed, ollama.ChatResponse):
    """``ollama.ChatResponse`` with the decision."""


class GenerateResponse(_Routed, ollama.GenerateResponse):
    """``ollama.GenerateResponse`` with the decision."""


class EmbedResponse(_Routed, ollama.EmbedResponse):
    """``ollama.EmbedResponse`` with the decision."""


class EmbeddingsResponse(_Routed, ollama.EmbeddingsResponse):
    """``ollama.EmbeddingsResponse`` with the decision."""


_ROUTED: dict[Any, Any] = {
    ollama.ChatResponse: ChatResponse,
    ollama.GenerateResponse: GenerateResponse,
    ollama.EmbedResponse: EmbedResponse,
    ollama.EmbeddingsResponse: EmbeddingsResponse,
}


class NoNodeHasModelError(NoEligibleNodeError, ollama.ResponseError):
    """No node has the model; also what ``ollama`` raises for it, with status 404."""

    def __init__(self, cause: NoEligibleNodeError) -> None:
        super().__init__(str(cause), model=cause.model, rejections=cause.rejections)
        self.error = str(cause)
        self.status_code = 404

    def __str__(self) -> str:
        return self.error


def _translated(cause: NoEligibleNodeError) -> NoEligibleNodeError:
    if cause.rejections and all(r.reason == MODEL_MISSING for r in cause.rejections):
        return NoNodeHasModelError(cause)
    return cause


# --------------------------------------------------------------------------- verbs

VERBS = (
    "chat",
    "generate",
    "embed",
    "embeddings",
    "list",
    "ps",
    "show",
    "pull",
    "push",
    "create",
    "create_blob",
    "copy",
    "delete",
    "systemone",
)


RESTART_OF = "restart_of"
"""Argument of every verb: the StreamBrokenError in which the same call ended before."""


@functools.lru_cache(maxsize=64)
def _parameters(verb: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(verb).parameters) - {"self"}


def _routing_and_rest(
    verb: Callable[..., Any], keywords: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the transport is told of the call, and ollama's own arguments; a misspelt one raises."""
    words, rest = split_words(keywords)
    routing: dict[str, Any] = {WORDS_EXTENSION: words}
    if RESTART_OF in rest:
        routing[RESTART_EXTENSION] = rest.pop(RESTART_OF)
    known = _parameters(verb)
    for name in rest:
        if name not in known:
            names = (*WORDS, RESTART_OF, *sorted(known))
            raise RoutingWordError(
                f"{verb.__name__}() got an unexpected argument: {unknown_word(name, names)}"
            )
    return routing, rest


def _with_words(verb: Callable[..., Any]) -> inspect.Signature:
    """Ollama's signature, and the routing words after it: for help() and editors."""
    signature = inspect.signature(verb)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, field in RoutingWords.model_fields.items():
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=field.annotation
            )
        )
    broken = StreamBrokenError | None
    parameters.append(
        inspect.Parameter(
            RESTART_OF, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=broken
        )
    )
    return signature.replace(parameters=parameters)


def _sync_verb(name: str) -> Any:
    verb = getattr(ollama.Client, name)

    @functools.wraps(verb)
    def call(self: Client, *args: Any, **keywords: Any) -> Any:
        routing, rest = _routing_and_rest(verb, keywords)
        return verb(_BoundClient(self, routing), *args, **rest)

    call.__signature__ = _with_words(verb)  # type: ignore[attr-defined]  # read by inspect
    return call


def _async_verb(name: str) -> Any:
    verb = getattr(ollama.AsyncClient, name)

    @functools.wraps(verb)
    async def call(self: AsyncClient, *args: Any, **keywords: Any) -> Any:
        routing, rest = _routing_and_rest(verb, keywords)
        return await verb(_BoundAsyncClient(self, routing), *args, **rest)

    call.__signature__ = _with_words(verb)  # type: ignore[attr-defined]  # read by inspect
    return call


# ------------------------------------------------------------------------- clients


class Client(ollama.Client):
    """
    ``ollama.Client`` over several nodes.

    Args:
        nodes: URLs or :class:`hydra_llm.Node`; by default what the settings say. Clients of
            the same nodes share one router.
        router: one that exists already; it is not closed with the client.
        settings: for a router made here.
        timeout: httpx's, per attempt; by default silence is limited by the settings only.
        headers: sent to every node; a node's own go to that node only.
        plain_parts: the parts of a stream are dictionaries, as they came, instead of ollama's
            types: for whoever takes them apart at once, and wants to be quick about it.
        routing: routing words that hold for every call.

    Raises:
        ConfigurationError: a node, a setting or a routing word is wrong.
    """

    def __init__(
        self,
        nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None = None,
        *,
        router: Router | None = None,
        settings: HydraSettings | None = None,
        timeout: Any = None,
        headers: Mapping[str, str] | None = None,
        plain_parts: bool = False,
        **routing: Any,
    ) -> None:
        _check_constructor_words(routing)
        transport = HydraTransport(nodes, router=router, settings=settings, **routing)
        # The host is a name for "whichever node": it is never connected to.
        super().__init__("http://hydra", transport=transport, timeout=timeout, headers=headers)
        self._transport = transport
        self._is_key_for_all = _is_key_for_all(headers, transport.router)
        self._plain_parts = plain_parts

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self._transport.router

    chat: Any = _sync_verb("chat")
    generate: Any = _sync_verb("generate")
    embed: Any = _sync_verb("embed")
    embeddings: Any = _sync_verb("embeddings")
    list: Any = _sync_verb("list")
    ps: Any = _sync_verb("ps")
    show: Any = _sync_verb("show")
    pull: Any = _sync_verb("pull")
    push: Any = _sync_verb("push")
    create: Any = _sync_verb("create")
    create_blob: Any = _sync_verb("create_blob")
    copy: Any = _sync_verb("copy")
    delete: Any = _sync_verb("delete")
    if hasattr(ollama.Client, "systemone"):  # newer than the oldest ollama that will do
        systemone: Any = _sync_verb("systemone")

    def web_search(self, *args: Any, **keywords: Any) -> Any:
        """Not about nodes: use ``ollama.Client``."""
        raise _not_about_nodes("web_search")

    def web_fetch(self, *args: Any, **keywords: Any) -> Any:
        """Not about nodes: use ``ollama.Client``."""
        raise _not_about_nodes("web_fetch")

    def _send(
        self, routing: Mapping[str, Any], method: str, path: str, **body: Any
    ) -> httpx.Response:
        # Straight to the transport: what httpx's client adds (cookies, redirects, its own
        # hooks) is of no use here and takes longer than choosing the node.
        request = _request(self._client, self._is_key_for_all, routing, method, path, **body)
        try:
            return self._transport.handle_request(request)
        except NoEligibleNodeError as exc:
            raise _translated(exc) from exc.__cause__

    def _parts(
        self, cls: Any, routing: Mapping[str, Any], method: str, path: str, **body: Any
    ) -> Iterator[Any]:
        make = dict if self._plain_parts else _ROUTED.get(cls, cls)
        response = self._send(routing, method, path, **body)
        try:
            if response.status_code >= 400:
                response.read()
                raise ollama.ResponseError(response.text, response.status_code)
            part = _Parts(make, response)
            assert isinstance(response.stream, httpx.SyncByteStream)
            for data in response.stream:
                for line in part.lines(data):
                    yield part.made(line)
            for line in part.end():
                yield part.made(line)
        finally:
            response.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.router!r}>"


class AsyncClient(ollama.AsyncClient):
    """``ollama.AsyncClient`` over several nodes; arguments as for :class:`Client`."""

    def __init__(
        self,
        nodes: str | Node | Iterable[str | Node | Mapping[str, Any]] | None = None,
        *,
        router: Router | None = None,
        settings: HydraSettings | None = None,
        timeout: Any = None,
        headers: Mapping[str, str] | None = None,
        plain_parts: bool = False,
        **routing: Any,
    ) -> None:
        _check_constructor_words(routing)
        transport = AsyncHydraTransport(nodes, router=router, settings=settings, **routing)
        super().__init__("http://hydra", transport=transport, timeout=timeout, headers=headers)
        self._transport = transport
        self._is_key_for_all = _is_key_for_all(headers, transport.router)
        self._plain_parts = plain_parts

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self._transport.router

    chat: Any = _async_verb("chat")
    generate: Any = _async_verb("generate")
    embed: Any = _async_verb("embed")
    embeddings: Any = _async_verb("embeddings")
    list: Any = _async_verb("list")
    ps: Any = _async_verb("ps")
    show: Any = _async_verb("show")
    pull: Any = _async_verb("pull")
    push: Any = _async_verb("push")
    create: Any = _async_verb("create")
    create_blob: Any = _async_verb("create_blob")
    copy: Any = _async_verb("copy")
    delete: Any = _async_verb("delete")
    if hasattr(ollama.AsyncClient, "systemone"):
        systemone: Any = _async_verb("systemone")

    async def web_search(self, *args: Any, **keywords: Any) -> Any:
        """Not about nodes: use ``ollama.AsyncClient``."""
        raise _not_about_nodes("web_search")

    async def web_fetch(self, *args: Any, **keywords: Any) -> Any:
        """Not about nodes: use ``ollama.AsyncClient``."""
        raise _not_about_nodes("web_fetch")

    async def _send(
        self, routing: Mapping[str, Any], method: str, path: str, **body: Any
    ) -> httpx.Response:
        request = _request(self._client, self._is_key_for_all, routing, method, path, **body)
        try:
            return await self._transport.handle_async_request(request)
        except NoEligibleNodeError as exc:
            raise _translated(exc) from exc.__cause__

    async def _parts(
        self, cls: Any, routing: Mapping[str, Any], method: str, path: str, **body: Any
    ) -> AsyncIterator[Any]:
        make = dict if self._plain_parts else _ROUTED.get(cls, cls)
        response = await self._send(routing, method, path, **body)
        try:
            if response.status_code >= 400:
                await response.aread()
                raise ollama.ResponseError(response.text, response.status_code)
            part = _Parts(make, response)
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for data in response.stream:
                for line in part.lines(data):
                    yield part.made(line)
            for line in part.end():
                yield part.made(line)
        finally:
            await response.aclose()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.router!r}>"


# ------------------------------------------------------------------- bound to a call


class _BoundClient(ollama.Client):
    """One call of a client with its routing words: ollama's verbs end up here."""

    def __init__(self, client: Client, routing: Mapping[str, Any]) -> None:
        # Deliberately not ollama's: it would open an httpx client of its own.
        self._hydra = client
        self._routing = routing

    def _request_raw(self, *args: Any, **keywords: Any) -> Any:
        response = self._hydra._send(self._routing, *args, **keywords)
        if DOCUMENT_EXTENSION in response.extensions:
            return response
        response.read()
        if response.status_code >= 400:
            raise ollama.ResponseError(response.text, response.status_code)
        return response

    def _request(self, cls: Any, *args: Any, stream: bool = False, **keywords: Any) -> Any:
        if stream:
            return self._hydra._parts(cls, self._routing, *args, **keywords)
        return _parsed(cls, self._request_raw(*args, **keywords))


class _BoundAsyncClient(ollama.AsyncClient):
    """As :class:`_BoundClient`, for an event loop."""

    def __init__(self, client: AsyncClient, routing: Mapping[str, Any]) -> None:
        # Deliberately not ollama's: it would open an httpx client of its own.
        self._hydra = client
        self._routing = routing

    async def _request_raw(self, *args: Any, **keywords: Any) -> Any:
        response = await self._hydra._send(self._routing, *args, **keywords)
        if DOCUMENT_EXTENSION in response.extensions:
            return response
        await response.aread()
        if response.status_code >= 400:
            raise ollama.ResponseError(response.text, response.status_code)
        return response

    async def _request(self, cls: Any, *args: Any, stream: bool = False, **keywords: Any) -> Any:
        if stream:
            return self._hydra._parts(cls, self._routing, *args, **keywords)
        return _parsed(cls, await self._request_raw(*args, **keywords))


# ------------------------------------------------------------------------- helpers


def _check_constructor_words(routing: Mapping[str, Any]) -> None:
    if "host" in routing:
        raise ConfigurationError("give nodes=[...] (or one URL as the first argument), not host")
    for name in routing:
        if name not in WORDS:
            raise RoutingWordError(f"unexpected argument: {unknown_word(name)}")


def _is_key_for_all(headers: Mapping[str, str] | None, router: Router) -> bool:
    """
    Whether the client's ``Authorization`` is meant for whatever node is chosen.

    One that was given is. One that ollama's client took from ``OLLAMA_API_KEY`` is meant for
    the only node, where there is just one; of several it is not known whose key it is.
    """
    is_given = any(name.lower() == "authorization" for name in headers or ())
    return is_given or len(router.settings.nodes) == 1


def _not_about_nodes(verb: str) -> ConfigurationError:
    return ConfigurationError(f"{verb} asks ollama.com, not a node: use ollama.Client for it")


@functools.lru_cache(maxsize=256)
def _url(path: str) -> httpx.URL:
    return httpx.URL("http://hydra" + path)


def _request(
    client: httpx.Client | httpx.AsyncClient,
    is_for_all: bool,
    routing: Mapping[str, Any],
    method: str,
    path: str,
    *,
    json: Mapping[str, Any] | None = None,
    content: Any = None,
) -> httpx.Request:
    if client.is_closed:
        # In httpx's own words and type, since that is what ollama's client raises.
        raise RuntimeError("Cannot send a request, as the client has been closed.")
    extensions: dict[str, Any] = {
        "timeout": client.timeout.as_dict(),
        **routing,
        AUTHORIZATION_EXTENSION: is_for_all,
    }
    if json is not None:
        extensions[PAYLOAD_EXTENSION] = json
        # As a stream: the transport frames what it sends on by itself.
        return httpx.Request(
            method,
            _url(path),
            headers=client.headers,
            stream=httpx.ByteStream(encode(json)),
            extensions=extensions,
        )
    return httpx.Request(
        method, _url(path), headers=client.headers, content=content, extensions=extensions
    )


class _Parts:
    """Makes ollama's types, or dictionaries, of a stream's lines."""

    def __init__(self, make: Callable[..., Any], response: httpx.Response) -> None:
        self._make = make
        self._response = response
        self._dispatch: Dispatch | None = response.extensions.get(DISPATCH_EXTENSION)
        self._count = 0
        self._rest = bytearray()

    def lines(self, data: bytes) -> Iterator[bytes]:
        """The lines that are whole with these bytes."""
        if b"\n" in data:
            if self._rest:
                data = bytes(self._rest) + data
                self._rest.clear()
            *lines, data = data.split(b"\n")
            yield from filter(None, lines)
        self._rest += data
        if len(self._rest) > MAX_LINE_BYTES:
            raise self._unreadable()

    def end(self) -> Iterator[bytes]:
        """The last line, if it had no end."""
        if self._rest:
            yield bytes(self._rest)

    def made(self, line: bytes) -> Any:
        """One part."""
        made = _understood(self._made, line)
        if made is None:
            raise self._unreadable()
        self._count += 1
        return made

    def _made(self, line: bytes) -> Any:
        # Decoded here: of bytes, json would look for their encoding first.
        part = json.loads(line.decode("utf-8", "surrogatepass"))
        if self._dispatch is not None and part.get("done") is True:
            part.update(_facts(self._dispatch.decision()))
        return self._make(**part)

    def _unreadable(self) -> NodeError:
        error = _no_answer(self._response)
        if self._dispatch is not None and self._dispatch.is_held:
            return self._dispatch.broken(error, self._count)
        return error


def _parsed(cls: Any, response: httpx.Response) -> Any:
    def made() -> Any:
        dispatch: Dispatch | None = response.extensions.get(DISPATCH_EXTENSION)
        document = response.extensions.get(DOCUMENT_EXTENSION)
        document = response.json() if document is None else document
        if dispatch is None:
            return cls(**document)
        return _ROUTED.get(cls, cls)(**document, **_facts(dispatch.decision()))

    answer = _understood(made)
    if answer is None:
        raise _no_answer(response)
    return answer


def _understood(make: Callable[..., Any], *args: bytes) -> Any:
    """
    What is made of an answer; None for JSON that is none, or is no answer.

    To be raised by the caller, outside of this: json's and pydantic's errors show what they could
    not read, and no error of ours may be raised in their context.
    """
    try:
        return make(*args)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _no_answer(response: httpx.Response) -> NodeProtocolError:
    dispatch: Dispatch | None = response.extensions.get(DISPATCH_EXTENSION)
    if dispatch is not None:
        node_id, node_url = dispatch.node.id, dispatch.node.url
    else:
        node_id, node_url = response.headers.get("x-hydra-node-id", "a node"), ""
    return NodeProtocolError(
        f"{node_id} answered with something that is no answer of Ollama's",
        node_id=node_id,
        node_url=node_url,
    )


def _facts(decision: RoutingDecision) -> dict[str, Any]:
    return {
        "routing_decision": decision,
        "node_id": decision.selected_node,
        "node_url": decision.node_url,
    }
