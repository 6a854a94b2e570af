"""One question to a node over HTTP, and what its failure makes of the node."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import httpx

from hydra_llm.pools import HandshakeGuard
from hydra_llm.types import Health, Node

__all__ = [
    "MAX_BODY_BYTES",
    "NodeApi",
    "ProbeError",
    "TooLargeError",
    "quiet_request",
    "read_body",
    "trouble_of",
]

MAX_BODY_BYTES = 16 << 20
"""More than this is no answer to a probe, and is not read to its end."""

_T = TypeVar("_T")


class ProbeError(Exception):
    """A probe that failed: what that makes of the node, and why, without any credential."""

    def __init__(self, health: Health, reason: str, *, is_silence: bool = False) -> None:
        super().__init__(reason)
        self.health: Health = health
        self.reason = reason
        self.is_silence = is_silence


class NodeApi:
    """
    Asks one node.

    Args:
        node: whom; its headers go to it alone.
        transport: connections; it follows no redirect, keeps no cookie and knows no proxy.
        timeout_seconds: for each answer.
    """

    def __init__(
        self, node: Node, transport: httpx.AsyncBaseTransport, *, timeout_seconds: float
    ) -> None:
        self._node = node
        self._transport = transport
        self._timeout = timeout_seconds

    async def ask(
        self,
        method: str,
        path: str,
        parse: Callable[[object], _T],
        body: Mapping[str, str] | None = None,
    ) -> _T:
        """
        One question and its answer, understood.

        Raises:
            ProbeError: nothing else.
        """
        try:
            text = await asyncio.wait_for(self._send(method, path, body), self._timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            reason = f"{path} gave no answer in {self._timeout:g} s"
            raise ProbeError("down", reason, is_silence=True) from None
        except ProbeError:
            raise
        except Exception as error:
            raise trouble_of(error) from error
        try:
            return parse(json.loads(text))
        except (ValueError, RecursionError):
            what = "a web page" if text.lstrip()[:1] == b"<" else "something"
            raise ProbeError(
                "misconfigured", f"{path} is {what} that no Ollama server sends"
            ) from None

    async def ask_if_possible(
        self,
        method: str,
        path: str,
        parse: Callable[[object], _T],
        body: Mapping[str, str] | None = None,
    ) -> tuple[_T | None, str]:
        """As :meth:`ask`, of what a round can do without: the answer, or why there is none."""
        try:
            return await self.ask(method, path, parse, body), ""
        except ProbeError as trouble:
            return None, trouble.reason

    async def _send(self, method: str, path: str, body: Mapping[str, str] | None) -> bytes:
        request = quiet_request(
            method,
            self._node.url + path,
            accept="application/json",
            headers=self._node.headers,
            body=body,
        )
        response = await self._transport.handle_async_request(request)
        try:
            _check_status(response.status_code, path)
            return await read_body(response, MAX_BODY_BYTES)
        except TooLargeError as error:
            raise ProbeError("misconfigured", f"{path} {error}: no Ollama server") from None
        finally:
            await response.aclose()


def quiet_request(
    method: str,
    url: str,
    *,
    accept: str,
    headers: Mapping[str, str] | None,
    body: Mapping[str, str] | None = None,
) -> httpx.Request:
    """A request with our headers and the caller's, whose time limit is the caller's too."""
    sent = httpx.Headers({"Accept": accept, "User-Agent": "hydra-llm"})
    # A compressed body could be far larger than it looks.
    sent["Accept-Encoding"] = "identity"
    sent.update(headers)
    return httpx.Request(
        method,
        url,
        headers=sent,
        json=body,
        extensions={
            "timeout": dict.fromkeys(("connect", "read", "write", "pool")),
            "trace": HandshakeGuard(),
        },
    )


class TooLargeError(Exception):
    """A body that is larger than anything that is asked for."""


async def read_body(response: httpx.Response, limit_bytes: int) -> bytes:
    """
    The whole body.

    Raises:
        TooLargeError: it has more bytes than that; the rest is not read.
    """
    received = bytearray()
    assert isinstance(response.stream, httpx.AsyncByteStream)  # from an async transport
    async for part in response.stream:
        received += part
        if len(received) > limit_bytes:
            raise TooLargeError(f"is larger than {limit_bytes >> 20} MiB")
    return bytes(received)


def _check_status(status: int, path: str) -> None:
    if status == 200:
        return
    if status in (401, 403):
        raise ProbeError("misconfigured", f"refuses access ({status}); check Node(headers=...)")
    if 300 <= status < 400:
        raise ProbeError("misconfigured", f"redirects ({status}); configure the URL it leads to")
    if status in (408, 429) or status >= 500:
        raise ProbeError("down", f"{path} answers with status {status}")
    raise ProbeError("misconfigured", f"{path} answers with status {status}: no Ollama server")


# ------------------------------------------------------------------ what went wrong


def trouble_of(error: Exception) -> ProbeError:
    """A failed connection in a phrase of ours: the error's own text may name anything."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (why := _reason_of(cause)):
            return ProbeError("down", why)
    # Headers that no HTTP message may have, and host names that are none.
    if isinstance(error, (ValueError, httpx.LocalProtocolError, httpx.InvalidURL)):
        return ProbeError("misconfigured", "its configured URL or headers cannot be sent")
    is_cut_off = "disconnected" in str(error) or "closed connection" in str(error)
    if isinstance(error, httpx.RemoteProtocolError) and not is_cut_off:
        return ProbeError("misconfigured", "what it sends is not HTTP")
    if isinstance(error, httpx.TransportError):
        is_connected = not isinstance(error, httpx.ConnectError)
        return ProbeError("down", "the connection broke" if is_connected else "no connection")
    return ProbeError("down", f"it could not be asked ({type(error).__name__})")


def _reason_of(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message or "it cannot be verified"
        return f"its TLS certificate is not accepted: {why}"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, socket.gaierror):
        return "its host name is unknown"
    code = error.errno
    return os.strerror(code).lower() if code is not None and code in errno.errorcode else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and what that was made of."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        waiting += getattr(one, "exceptions", ())  # an ExceptionGroup, one for each address
