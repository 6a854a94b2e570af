"""
LiteLLM's HTTP handlers over our transport: one for each attempt, on the node chosen for it.

LiteLLM takes a handler as the argument ``client`` of a call. So what happens on the wire is
seen where it happens: the first part, the last one, a break, a client that has left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler, HTTPHandler

from hydra_llm import AsyncHydraTransport, Dispatch, HydraTransport, NodeError, Router
from hydra_llm.integrations.litellm.errors import AttemptError

__all__ = ["AsyncWire", "Wire", "Wires"]


class Wires:
    """The clients that all attempts of one router share."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.transport = HydraTransport(router=router)
        self.async_transport = AsyncHydraTransport(router=router)
        self.client = httpx.Client(transport=self.transport, trust_env=False)
        self.async_client = httpx.AsyncClient(transport=self.async_transport, trust_env=False)

    def handler(self, dispatch: Dispatch) -> Wire:
        """Make the handler for one attempt."""
        return Wire(self.client, dispatch)

    def async_handler(self, dispatch: Dispatch, on_send: Callable[[], object]) -> AsyncWire:
        """Make the handler for one attempt on an event loop; it calls ``on_send`` first."""
        return AsyncWire(self.async_client, dispatch, on_send)


class Wire(HTTPHandler):
    """Sends one attempt to the node that its dispatch holds a place on."""

    def __init__(self, client: httpx.Client, dispatch: Dispatch) -> None:
        # Not its parent's, which opens a pool.
        self._shared = client
        self._dispatch = dispatch

    def post(self, url: str, *args: Any, **options: Any) -> httpx.Response:
        """Send a request, as LiteLLM's handler does."""
        stream = bool(options.pop("stream", False))
        request = _built(self._shared, self._dispatch, url, args, options)
        try:
            response = self._shared.send(request, stream=stream)
        except NodeError as error:
            raise AttemptError(error, self._dispatch) from error
        return _checked(response)

    def close(self) -> None:
        """The client is shared."""

    def __del__(self) -> None:
        """Nor is there anything else of its own."""


class AsyncWire(AsyncHTTPHandler):
    """As :class:`Wire`, for an event loop."""

    def __init__(
        self, client: httpx.AsyncClient, dispatch: Dispatch, on_send: Callable[[], object]
    ) -> None:
        self._shared = client
        self._dispatch = dispatch
        self._on_send = on_send

    async def post(self, url: str, *args: Any, **options: Any) -> httpx.Response:
        """Send a request, as LiteLLM's handler does."""
        stream = bool(options.pop("stream", False))
        request = _built(self._shared, self._dispatch, url, args, options)
        self._on_send()
        try:
            response = await self._shared.send(request, stream=stream)
        except NodeError as error:
            raise AttemptError(error, self._dispatch) from error
        return _checked(response)

    async def close(self) -> None:
        """The client is shared."""

    def __del__(self) -> None:
        """Nor is there anything else of its own."""


_BODY = ("data", "json", "params", "headers")


def _built(
    client: httpx.Client | httpx.AsyncClient,
    dispatch: Dispatch,
    url: str,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> httpx.Request:
    given: dict[str, Any] = dict(zip(_BODY, args, strict=False)) | dict(options)
    data, content = given.get("data"), given.get("content")
    if isinstance(data, (str, bytes)):
        data, content = None, data
    timeout = given.get("timeout")
    return client.build_request(
        "POST",
        url,
        data=data,
        content=content,
        json=given.get("json"),
        params=given.get("params"),
        headers=given.get("headers"),
        timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
        # LiteLLM has put the key of this very deployment into the headers.
        extensions={"hydra_dispatch": dispatch, "hydra_authorization": True},
    )


def _checked(response: httpx.Response) -> httpx.Response:
    try:
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        # What LiteLLM's own handlers add.
        error.status_code = response.status_code  # type: ignore[attr-defined]
        error.message = error.text = response.text  # type: ignore[attr-defined]
        raise
    return response
