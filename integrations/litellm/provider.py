"""
The provider `hydra/<model>`: one line per model, and the nodes chosen behind it.

For LiteLLM there is one deployment; which node serves a request, and which one next if that
fails, is decided in here, so nothing depends on LiteLLM's own router::

    register_provider()
    litellm.completion(model="hydra/llama3.2", messages=[...], node_id="rig")

In the proxy's `config.yaml`::

    model_list:
      - model_name: llama3.2
        litellm_params: {model: hydra/llama3.2}
    litellm_settings:
      custom_provider_map:
        - {provider: hydra, custom_handler: hydra_llm.integrations.litellm.provider.handler}
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from itertools import chain
from typing import Any

import httpx
import litellm
from litellm.llms.custom_llm import CustomLLM
from litellm.utils import custom_llm_setup

from hydra_llm import AsyncHydraTransport, HydraTransport, Router
from hydra_llm.integrations.litellm.errors import as_litellm_errors, refusal
from hydra_llm.integrations.litellm.provider_chat import (
    StreamReader,
    body_of_chat,
    fill_answer,
    usage_of,
)
from hydra_llm.integrations.litellm.telling import beside_an_answer
from hydra_llm.integrations.litellm.words import parted_call

__all__ = ["HydraProvider", "handler", "register_provider"]

NAME = "hydra"
_EMBED_FIELDS = ("dimensions", "keep_alive", "truncate")
_END = b"\n"
"""What a stream's last line may come without."""


class HydraProvider(CustomLLM):
    """
    LiteLLM's door to a router: takes OpenAI's parameters, Ollama's and the routing words.

    Args:
        router: by default one of its own, made from the settings at the first request.
    """

    def __init__(self, router: Router | None = None) -> None:
        super().__init__()
        self._router = router
        self._transports: tuple[HydraTransport, AsyncHydraTransport] | None = None
        self._lock = threading.Lock()

    @property
    def router(self) -> Router:
        """The router behind it."""
        return self._connected()[0].router

    def _connected(self) -> tuple[HydraTransport, AsyncHydraTransport]:
        with self._lock:
            if self._transports is None:
                router = Router() if self._router is None else self._router
                self._transports = HydraTransport(router=router), AsyncHydraTransport(router=router)
            return self._transports

    # LiteLLM gives everything by name.

    def completion(self, *_: Any, **call: Any) -> Any:
        """A whole answer."""
        with as_litellm_errors(call["model"]):
            response = self._connected()[0].handle_request(_chat_request(call))
            response.read()
        return _answer(call, response)

    async def acompletion(self, *_: Any, **call: Any) -> Any:
        """A whole answer, without blocking the event loop."""
        with as_litellm_errors(call["model"]):
            response = await self._connected()[1].handle_async_request(_chat_request(call))
            await response.aread()
        return _answer(call, response)

    def streaming(self, *_: Any, **call: Any) -> Iterator[Any]:
        """An answer in parts; a request that fails at once fails here, where LiteLLM retries."""
        chunks = self._chunks(call)
        return _resumed(next(chunks), chunks)

    def _chunks(self, call: Mapping[str, Any]) -> Generator[Any, None, None]:
        reader = StreamReader(call["model"])
        with as_litellm_errors(call["model"]):
            response = self._connected()[0].handle_request(_chat_request(call, stream=True))
            try:
                if response.status_code != 200:
                    response.read()
                    raise refusal(response, call["model"])
                lines = _Lines()
                assert isinstance(response.stream, httpx.SyncByteStream)
                for data in chain(response.stream, [_END]):
                    for part in lines.parts_of(data):
                        yield from reader.chunks_of(part, _decision_with(part, response))
            finally:
                response.close()

    def astreaming(self, *_: Any, **call: Any) -> Any:
        """An answer in parts, for an event loop; the request is sent when the first is asked for.

        LiteLLM takes an iterator here and waits for nothing, so it cannot be sent before.
        """
        return _AsyncChunks(call["model"], self._parts(call))

    async def _parts(self, call: Mapping[str, Any]) -> AsyncGenerator[tuple[Any, Any], None]:
        request = _chat_request(call, stream=True)
        response = await self._connected()[1].handle_async_request(request)
        try:
            if response.status_code != 200:
                await response.aread()
                raise refusal(response, call["model"])
            lines = _Lines()
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for data in response.stream:
                for part in lines.parts_of(data):
                    yield part, _decision_with(part, response)
            for part in lines.parts_of(_END):
                yield part, _decision_with(part, response)
        finally:
            await response.aclose()

    def embedding(self, *_: Any, **call: Any) -> Any:
        """Embeddings of one text or several."""
        with as_litellm_errors(call["model"]):
            response = self._connected()[0].handle_request(_embed_request(call))
            response.read()
        return _embedded(call, response)

    async def aembedding(self, *_: Any, **call: Any) -> Any:
        """Embeddings of one text or several, without blocking the event loop."""
        with as_litellm_errors(call["model"]):
            response = await self._connected()[1].handle_async_request(_embed_request(call))
            await response.aread()
        return _embedded(call, response)


handler = HydraProvider()
"""For the proxy's `config.yaml`, which wants an instance."""


def register_provider(hydra: Router | None = None) -> None:
    """
    Teach LiteLLM the provider `hydra/`. Calling it again changes nothing.

    Args:
        hydra: the router to use; by default one made from the settings at the first request.
    """
    ours = handler if hydra is None else HydraProvider(hydra)
    others = []
    for item in litellm.custom_provider_map:
        known = item["custom_handler"]
        if item["provider"] != NAME:
            others.append(item)
        elif isinstance(known, HydraProvider) and known._router is hydra:
            ours = known
    litellm.custom_provider_map = [*others, {"provider": NAME, "custom_handler": ours}]
    custom_llm_setup()


# ------------------------------------------------------------------------ requests


def _chat_request(call: Mapping[str, Any], *, stream: bool = False) -> httpx.Request:
    words, rest = parted_call(call["optional_params"], call.get("litellm_params") or {})
    rest["stream"] = stream
    body = body_of_chat(call["model"], call["messages"], rest, drop_params=_drops(call))
    return _request("/api/chat", body, words, call.get("timeout"))


def _embed_request(call: Mapping[str, Any]) -> httpx.Request:
    words, rest = parted_call(call["optional_params"], call.get("litellm_params") or {})
    body = {"model": call["model"], "input": call["input"]}
    body |= {name: rest.pop(name) for name in _EMBED_FIELDS if name in rest}
    return _request("/api/embed", {**body, "options": rest}, words, call.get("timeout"))


def _drops(call: Mapping[str, Any]) -> bool:
    return bool(litellm.drop_params or (call.get("litellm_params") or {}).get("drop_params"))


def _request(path: str, body: Any, words: Mapping[str, Any], timeout: Any) -> httpx.Request:
    # To the transport as it is. Ollama's own client would leave out of a tool's schema what it
    # has no type for, and read an image's text as the name of a file.
    extensions: dict[str, Any] = {"hydra_words": words}
    if timeout is not None:
        extensions["timeout"] = httpx.Timeout(timeout).as_dict()
    return httpx.Request(
        "POST",
        "http://hydra" + path,
        headers={"content-type": "application/json"},
        content=json.dumps(body).encode(),
        extensions=extensions,
    )


# ------------------------------------------------------------------------- answers


def _answer(call: Mapping[str, Any], response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise refusal(response, call["model"])
    answer = call["model_response"]
    fill_answer(answer, response.json(), call["model"])
    answer._hidden_params.update(beside_an_answer(_decision(response).to_dict()))
    return answer


def _embedded(call: Mapping[str, Any], response: httpx.Response) -> Any:
    if response.status_code != 200:
        raise refusal(response, call["model"])
    document, answer = response.json(), call["model_response"]
    answer.data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(document["embeddings"])
    ]
    answer.model = call["model"]
    answer.usage = usage_of(document)
    answer._hidden_params.update(beside_an_answer(_decision(response).to_dict()))
    return answer


def _decision(response: httpx.Response) -> Any:
    return response.extensions["hydra_dispatch"].decision()


def _decision_with(part: Mapping[str, Any], response: httpx.Response) -> Any:
    return _decision(response) if part.get("done") is True else None


class _Lines:
    """Cuts a stream into its lines, each a part. httpx would cut at U+0085 in a text too."""

    def __init__(self) -> None:
        self._rest = b""

    def parts_of(self, data: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                yield json.loads(line)


def _resumed(first: Any, chunks: Generator[Any, None, None]) -> Iterator[Any]:
    yield first
    yield from chunks


class _AsyncChunks:
    """
    The chunks of a stream, for LiteLLM to iterate over and to close.

    No generator around another: `asyncio.run()` closes all of them at once at its end, and one
    that another is just closing complains.
    """

    def __init__(self, model: str, parts: AsyncGenerator[tuple[Any, Any], None]) -> None:
        self._model = model
        self._parts = parts
        self._reader = StreamReader(model)
        self._ready: deque[Any] = deque()

    def __aiter__(self) -> _AsyncChunks:
        return self

    async def __anext__(self) -> Any:
        with as_litellm_errors(self._model):
            while not self._ready:
                self._ready.extend(self._reader.chunks_of(*await anext(self._parts)))
        return self._ready.popleft()

    async def aclose(self) -> None:
        await self._parts.aclose()
