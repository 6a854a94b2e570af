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
    """
    The transports that all attempts of one router share.

    There is no client before them: what it would add (redirects, cookies, logins) is nothing
    that a node should be asked with, and costs a tenth of a millisecond.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.transport = HydraTransport(router=router)
        self.async_transport = AsyncHydraTransport(router=router)

    def handler(self, dispatch: Dispatch) -> Wire:
        """Make the handler for one attempt."""
        return Wire(self.transport, dispatch)

    def async_handler(self, dispatch: Dispatch, on_send: Callable[[], object]) -> AsyncWire:
        """Make the handler for one attempt on an event loop; it calls ``on_send`` first."""
        return AsyncWire(self.async_transport, dispatch, on_send)

    def close(self) -> None:
        """Give the router back."""
        self.transport.close()


class Wire(HTTPHandler):
    """Sends one attempt to the node that its dispatch holds a place on."""

    def __init__(self, transport: HydraTransport, dispatch: Dispatch) -> None:
        # Not its parent's, which opens a pool.
        self._transport = transport
        self._dispatch = dispatch

    def post(self, url: str, *args: Any, **options: Any) -> httpx.Response:
        """Send a request, as LiteLLM's handler does."""
        stream = bool(options.pop("stream", False))
        request = _built(self._dispatch, url, args, options)
        try:
            response = self._transport.handle_request(request)
            response.request = request
            if not stream:
                response.read()
        except NodeError as error:
            raise AttemptError(error, self._dispatch) from error
        return _checked(response)

    def close(self) -> None:
        """The transport is shared."""

    def __del__(self) -> None:
        """Nor is there anything else of its own."""


class AsyncWire(AsyncHTTPHandler):
    """As :class:`Wire`, for an event loop."""

    def __init__(
        self, transport: AsyncHydraTransport, dispatch: Dispatch, on_send: Callable[[], object]
    ) -> None:
        self._transport = transport
        self._dispatch = dispatch
        self._on_send = on_send

    async def post(self, url: str, *args: Any, **options: Any) -> httpx.Response:
        """Send a request, as LiteLLM's handler does."""
        stream = bool(options.pop("stream", False))
        request = _built(self._dispatch, url, args, options)
        self._on_send()
        try:
            response = await self._transport.handle_async_request(request)
            response.request = request
            if not stream:
                await response.aread()
        except NodeError as error:
            raise AttemptError(error, self._dispatch) from error
        return _checked(response)

    async def close(self) -> None:
        """The transport is shared."""

    def __del__(self) -> None:
        """Nor is there anything else of its own."""


_BODY = ("data", "json", "params", "headers")


def _built(
    dispatch: Dispatch, url: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> httpx.Request:
    given: dict[str, Any] = dict(zip(_BODY, args, strict=False)) | dict(options)
    data, content = given.get("data"), given.get("content")
    if isinstance(data, (str, bytes)):
        data, content = None, data
    # LiteLLM has put the key of this very deployment into the headers.
    extensions: dict[str, Any] = {"hydra_dispatch": dispatch, "hydra_authorization": True}
    if given.get("timeout") is not None:
        extensions["timeout"] = httpx.Timeout(given["timeout"]).as_dict()
    return httpx.Request(
        "POST",
        url,
        data=data,
        content=content,
        json=given.get("json"),
        params=given.get("params"),
        headers=given.get("headers"),
        extensions=extensions,
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
