"""
Connections without sockets: HTTP/1.1 between a client and simulated nodes on one event loop.

What goes over them is what would go over a socket, byte for byte; both sides read it with h11.
A client makes a connection for each request.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Literal

import h11
import httpx

from hydra_llm.simulation.listener import Runs

__all__ = ["VirtualNetwork", "VirtualPort", "VirtualTransport", "Way"]

Way = Literal["open", "no route", "unknown host"]
"""How it goes to an address: an error may be all that a client gets."""

_FIRST_PORT = 40_001
_MOST_HEAD_BYTES = 100 * 1024
"""As httpcore has it: a head that does not end is no answer."""


class VirtualNetwork:
    """Who listens where, and how to get there."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, round_trip_s: float) -> None:
        self.loop = loop
        self.round_trip_s = round_trip_s
        self._ports: dict[tuple[str, int], VirtualPort] = {}
        self._ways: dict[tuple[str, int], Way] = {}
        self._next = _FIRST_PORT

    def port(self, host: str, number: int) -> VirtualPort:
        """
        Take a port; 0 takes a free one.

        Raises:
            OSError: it is taken.
        """
        if number == 0:
            number, self._next = self._next, self._next + 1
        if (host, number) in self._ports:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        port = self._ports[host, number] = VirtualPort(self, host, number)
        return port

    def give_back(self, host: str, number: int) -> None:
        """Nobody is there any more."""
        self._ports.pop((host, number), None)

    def set_way(self, host: str, number: int, way: Way) -> None:
        """Say how it goes to an address from now on; connections that are there stay."""
        self._ways[host, number] = way

    async def connect(self, host: str, number: int) -> _Link:
        """
        Connect.

        Raises:
            OSError: one cannot.
        """
        if self.round_trip_s:
            await asyncio.sleep(self.round_trip_s)
        way = self._ways.get((host, number), "open")
        if way == "no route":
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        if way == "unknown host":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        port = self._ports.get((host, number))
        if port is not None and port.is_silent:
            await self.loop.create_future()
        if port is None or port.make is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return _Link(self.loop, port.make())


class VirtualPort:
    """A port; see `hydra_llm.simulation.stage.Port`."""

    def __init__(self, network: VirtualNetwork, host: str, number: int) -> None:
        self._network = network
        self._host = host
        self.port = number
        self.make: Callable[[], asyncio.Protocol] | None = None
        self.is_silent = False

    def listen(self, thread: Runs, make: Callable[[], asyncio.Protocol]) -> None:
        """Let clients in."""
        self.make, self.is_silent = make, False

    def refuse(self) -> None:
        """Let nobody in."""
        self.make, self.is_silent = None, False

    def silence(self) -> None:
        """Let nobody in and say nothing."""
        self.make, self.is_silent = None, True

    def close(self) -> None:
        """Give the port back."""
        self.refuse()
        self._network.give_back(self._host, self.port)


class _Link:
    """
    One connection, as its client has it.

    ::

        open ──server closes──▶ ended (what has come can still be read)
          └───either resets, or the client closes──▶ gone
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, server: asyncio.Protocol) -> None:
        self._loop = loop
        self._come = bytearray()
        self._is_ended = False
        self._error: OSError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._server = _ServerEnd(loop, self, server)

    def send(self, data: bytes) -> None:
        """Send to the server."""
        self._loop.call_soon(self._server.receive, data)

    async def read(self, timeout_s: float | None) -> bytes:
        """
        Give what has come, or comes; nothing at the end.

        Raises:
            TimeoutError: nothing has come in that time.
            OSError: the connection was reset.
        """
        if not self._come and not self._is_ended:
            self._reader = self._loop.create_future()
            timer = None
            if timeout_s is not None:
                timer = self._loop.call_later(timeout_s, _time_is_over, self._reader)
            try:
                await self._reader
            finally:
                self._reader = None
                if timer is not None:
                    timer.cancel()
        if self._error is not None and not self._come:
            raise self._error
        data = bytes(self._come)
        self._come.clear()
        return data

    def close(self) -> None:
        """Close it; the server learns of it."""
        self._is_ended = True
        self._server.lose(None)

    # ------------------------------------------------------------------ from the server

    @property
    def unread(self) -> int:
        """Bytes that the client has not read."""
        return len(self._come)

    def arrive(self, data: bytes) -> None:
        """Take what the server sends."""
        self._come += data
        self._wake()

    def end(self, error: OSError | None) -> None:
        """Take notice that the server has closed, or reset, the connection."""
        self._is_ended, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _time_is_over(reader: asyncio.Future[None]) -> None:
    if not reader.done():
        reader.set_exception(TimeoutError())


class _ServerEnd(asyncio.Transport):
    """A connection as its server has it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, link: _Link, server: asyncio.Protocol
    ) -> None:
        self._socket = _Socket()
        super().__init__({"socket": self._socket})
        self._loop = loop
        self._link = link
        self._server = server
        self._is_closing = False
        server.connection_made(self)

    def receive(self, data: bytes) -> None:
        if not self._is_closing:
            self._server.data_received(data)

    def lose(self, error: OSError | None) -> None:
        """End it on this side."""
        if not self._is_closing:
            self._is_closing = True
            self._loop.call_soon(self._server.connection_lost, error)

    # ------------------------------------------------------------------ for the server

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._is_closing:
            self._link.arrive(bytes(data))

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._link.end(None)
            self.lose(None)

    def abort(self) -> None:
        if not self._is_closing:
            reset = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            self._link.end(reset if self._socket.resets else None)
            self.lose(None)

    def pause_reading(self) -> None:
        """Nothing more is read: what a client sends fits into one piece."""

    def resume_reading(self) -> None:
        """Read on."""

    def get_write_buffer_size(self) -> int:
        return self._link.unread


class _Socket:
    """As much of a socket as a server looks at."""

    family = socket.AF_UNIX if hasattr(socket, "AF_UNIX") else None
    resets = False

    def setsockopt(self, level: int, option: int, value: object) -> None:
        """Remember that the end shall be a reset."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.resets = True


class VirtualTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 over a virtual network; its errors are those of httpx's own transport."""

    def __init__(self, network: VirtualNetwork) -> None:
        self._network = network

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and give the answer as soon as its head is there."""
        exchange = _Exchange(request, await self._connect(request))
        try:
            await exchange.send()
            head = await exchange.head()
        except BaseException:
            exchange.close()
            raise
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_Body(exchange),
            extensions={"http_version": b"HTTP/" + head.http_version, "reason_phrase": head.reason},
        )

    async def _connect(self, request: httpx.Request) -> _Link:
        url, limit = request.url, _timeouts(request).get("connect")
        if url.scheme != "http":
            raise httpx.UnsupportedProtocol("a virtual network has no TLS", request=request)
        connecting = self._network.connect(url.host, url.port or 80)
        try:
            return await asyncio.wait_for(connecting, limit)
        except asyncio.TimeoutError:
            raise httpx.ConnectTimeout("", request=request) from None
        except OSError as exc:
            # As anyio has it: of several addresses each may fail for a reason of its own.
            is_about_name = isinstance(exc, socket.gaierror)
            text = str(exc) if is_about_name else "All connection attempts failed"
            raise httpx.ConnectError(text, request=request) from exc


class _Exchange:
    """A request and its answer."""

    def __init__(self, request: httpx.Request, link: _Link) -> None:
        self._request = request
        self._link = link
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD_BYTES)

    async def send(self) -> None:
        """Send all of the request."""
        request, http = self._request, self._http
        try:
            head = h11.Request(
                method=request.method.encode("ascii"),
                target=request.url.raw_path,
                headers=request.headers.raw,
            )
            data = http.send(head) or b""
            assert isinstance(request.stream, httpx.AsyncByteStream)
            async for part in request.stream:
                data += http.send(h11.Data(data=part)) or b""
            data += http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as exc:
            raise httpx.LocalProtocolError(str(exc), request=request) from exc
        self._link.send(data)

    async def head(self) -> h11.Response:
        """Wait for the head of the answer."""
        while True:
            event = await self.event()
            if isinstance(event, h11.Response):
                return event

    async def event(self) -> Any:
        """Wait for the next part of the answer."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as exc:
                raise httpx.RemoteProtocolError(str(exc), request=self._request) from exc
            if event is not h11.NEED_DATA:
                return event
            data = await self._read()
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                text = "Server disconnected without sending a response."
                raise httpx.RemoteProtocolError(text, request=self._request)
            self._http.receive_data(data)

    async def _read(self) -> bytes:
        try:
            limit: Any = _timeouts(self._request).get("read")
            # A router's limits know an end, too.
            left = getattr(limit, "left", None)
            return await self._link.read(limit if left is None else left())
        except TimeoutError:
            raise httpx.ReadTimeout("", request=self._request) from None
        except OSError as exc:
            raise httpx.ReadError(str(exc), request=self._request) from exc

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


class _Body(httpx.AsyncByteStream):
    """The body of an answer."""

    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while isinstance(event := await self._exchange.event(), h11.Data):
                yield bytes(event.data)
        finally:
            self._exchange.close()

    async def aclose(self) -> None:
        """Close the connection."""
        self._exchange.close()


def _timeouts(request: httpx.Request) -> Mapping[str, float | None]:
    """The time limits as they are now: a router changes them on the way."""
    timeouts: Mapping[str, float | None] = request.extensions.get("timeout") or {}
    return timeouts
