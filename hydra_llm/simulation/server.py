"""HTTP/1.1 for simulated nodes: asyncio and h11 on a thread of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any, Literal, Protocol, TypeVar

import h11

from hydra_llm.simulation.wire import Reply

__all__ = ["Connection", "Handler", "Listener", "LoopThread", "Port", "Stage"]

_T = TypeVar("_T")
_CLOSING_S = 5.0
_LAST_TURNS = 5
"""Turns of the loop from accepting a connection to having lost it."""


class Runs(Protocol):
    """What a coroutine can be given to, as a `LoopThread` is."""

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it, now or soon."""


class Port(Protocol):
    """An address that clients can be let in at, or not."""

    @property
    def port(self) -> int:
        """Its number."""
        ...

    def listen(self, thread: Runs, make: Callable[[], Connection]) -> None:
        """Let clients in: now, or in a moment."""

    def refuse(self) -> None:
        """Let nobody in, and keep the number."""

    def close(self) -> None:
        """Give the number back."""


class Stage(Runs, Protocol):
    """Where nodes live: a thread with real sockets and real time, or a virtual world."""

    loop: asyncio.AbstractEventLoop

    def clock(self) -> float:
        """Seconds that never go back."""
        ...

    def wall_clock(self) -> float:
        """Seconds since 1970, as clients have it."""
        ...

    def port(self, host: str, number: int) -> Port:
        """Take a port; 0 takes a free one."""
        ...

    def call(self, function: Callable[[], _T]) -> _T:
        """Run a function where the loop runs, and give what it returns."""
        ...

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Let the loop go on until something is so, for so many seconds at most."""

    def close(self) -> None:
        """End."""


class LoopThread:
    """An event loop on a thread; several nodes may share one."""

    clock = staticmethod(time.monotonic)
    wall_clock = staticmethod(time.time)

    def __init__(self, name: str = "simulated-ollama") -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self._settle())
        self.loop.close()

    @staticmethod
    async def _settle() -> None:
        """Let connections accepted at the last moment be made, cut and lost."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=_CLOSING_S) if others else None
        for _ in range(_LAST_TURNS):
            await asyncio.sleep(0)

    def call(self, function: Callable[[], _T]) -> _T:
        """Run a function on the loop's thread and wait for what it returns."""
        if threading.current_thread() is self._thread:
            return function()
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as exc:  # raised again where it was asked for
                future.set_exception(exc)

        self.loop.call_soon_threadsafe(run)
        return future.result()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the loop and wait for it; on the loop's own thread, soon."""
        if threading.current_thread() is self._thread:
            task = self.loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def port(self, host: str, number: int) -> Listener:
        """Take a port; 0 takes a free one."""
        return Listener(host, number)

    @staticmethod
    def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until something is so, for so many seconds at most."""
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)

    def close(self) -> None:
        """Stop the loop and wait for the thread to end."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSING_S)


class Handler(Protocol):
    """Whom a connection tells what comes in."""

    is_frozen: bool

    def request(self, connection: Connection, request: h11.Request, body: bytes) -> None:
        """Take a whole request."""

    def left(self, connection: Connection) -> None:
        """Take notice that the client, or the network, has closed the connection."""

    def opened(self, connection: Connection) -> None:
        """Take notice of a new connection."""


class Connection(asyncio.Protocol):
    """
    One client's connection: requests in, answers out, one at a time.

    ::

        idle ──request──▶ answering ──whole answer sent──▶ idle
          └────────────────────┴──closed, reset, cut──▶ gone
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._http = h11.Connection(h11.SERVER)
        self._transport: asyncio.Transport | None = None
        self._held = bytearray()
        self._request: h11.Request | None = None
        self._body = bytearray()

    # ------------------------------------------------------------------ from asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # As Go does. asyncio leaves it out for a listener made without a protocol number,
            # and every second write would wait 40 ms for the client's delayed ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._handler.opened(self)

    def data_received(self, data: bytes) -> None:
        """Read on; a frozen node reads nothing."""
        if self._handler.is_frozen:
            self._held += data
            return
        self._http.receive_data(data)
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._transport = None
        self._handler.left(self)

    def thaw(self) -> None:
        """Read what came while the node was frozen."""
        held, self._held = bytes(self._held), bytearray()
        if held:
            self.data_received(held)

    # ------------------------------------------------------------------ answers

    def send(self, reply: Reply, *, is_head: bool = False) -> None:
        """Send a whole answer."""
        self.start(reply.status, reply.content_type, reply.headers,
                   length=None if reply.chunked else len(reply.body))  # fmt: skip
        if not is_head and reply.body:
            self._write(h11.Data(data=reply.body))
        self.finish()

    def start(
        self,
        status: int,
        content_type: str | None,
        extra: tuple[tuple[str, str], ...] = (),
        *,
        length: int | None = None,
    ) -> None:
        """Send the head of an answer; without a length it comes in chunks."""
        headers = [("Content-Type", content_type)] if content_type else []
        headers += [*extra, ("Date", formatdate(usegmt=True))]
        if length is None:
            headers.append(("Transfer-Encoding", "chunked"))
        else:
            headers.append(("Content-Length", str(length)))
        reason = _REASONS.get(status, "")
        self._write(h11.Response(status_code=status, headers=headers, reason=reason.encode()))

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self._write(h11.Data(data=data))

    def finish(self) -> None:
        """End the answer, and serve the next request if the connection stays."""
        self._write(h11.EndOfMessage())
        if self._transport is None:
            return
        if self._http.our_state is h11.MUST_CLOSE or self._http.their_state is h11.MUST_CLOSE:
            self._transport.close()
            return
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._read()

    def drop(self) -> None:
        """Close as a killed process does: no ending, whatever was under way."""
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Close with a TCP reset."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                # Linger for no time: the kernel sends RST and not FIN.
                pattern = "hh" if sys.platform == "win32" else "ii"
                value = struct.pack(pattern, 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
        self._transport.abort()

    # ------------------------------------------------------------------ inside

    def _read(self) -> None:
        while self._transport is not None:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError:
                self._transport.close()
                return
            if isinstance(event, h11.Request):
                self._request, self._body = event, bytearray()
                if self._http.they_are_waiting_for_100_continue:
                    self._write(h11.InformationalResponse(status_code=100, headers=[]))
            elif isinstance(event, h11.Data):
                self._body += event.data
            elif isinstance(event, h11.EndOfMessage):
                request, self._request = self._request, None
                assert request is not None
                self._handler.request(self, request, bytes(self._body))
            else:
                return

    def _write(
        self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage
    ) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = self._http.send(event)
        if data:
            self._transport.write(data)


class Listener:
    """
    A port that can be closed to clients and yet stay ours.

    ::

        refusing ──listen──▶ listening ──refuse──▶ refusing
            └────────close───────┴──▶ closed

    To listen takes a turn of the loop, and is never broken off in the middle: the loop would go
    on watching a socket that is closed, and take the next one of that number for it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._socket = self._bind(port)
        self.port = int(self._socket.getsockname()[1])
        self._server: asyncio.Server | None = None
        self._wanted: Literal["listening", "refusing", "closed"] = "refusing"
        self._is_starting = False

    def listen(self, thread: Runs, make: Callable[[], Connection]) -> None:
        """Let clients in: now, or from the loop's own thread in a moment."""
        self._wanted = "listening"
        thread.run(self._start(make))

    async def _start(self, make: Callable[[], Connection]) -> None:
        if self._is_starting or self._server is not None or self._wanted != "listening":
            return
        self._is_starting = True
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(make, sock=self._socket)
        self._is_starting = False
        self._settle()

    def refuse(self) -> None:
        """Let nobody in: bound but not listening, so that the port is not lost."""
        self._wanted = "refusing"
        self._settle()

    def close(self) -> None:
        """Give the port back."""
        self._wanted = "closed"
        self._settle()

    def _settle(self) -> None:
        if self._is_starting or self._wanted == "listening":
            return
        if self._server is not None:
            server, self._server = self._server, None
            self._stop(server)
            if self._wanted == "refusing":
                self._socket = self._bind(self.port)
        if self._wanted == "closed":
            self._socket.close()

    def _stop(self, server: asyncio.Server) -> None:
        loop = asyncio.get_running_loop()
        try:
            loop.remove_reader(self._socket)
        except NotImplementedError:  # Windows' loop accepts in another way
            server.close()
            self._socket.close()
            return
        self._socket.close()
        # A connection accepted in this very turn joins the server in the next one, and would
        # never be closed if the server were gone by then.
        loop.call_soon(loop.call_soon, self._dismiss, server)

    @staticmethod
    def _dismiss(server: asyncio.Server) -> None:
        # It wants to stop watching its socket, which is closed already.
        with contextlib.suppress(ValueError):
            server.close()

    def _bind(self, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self._host, port))
        except OSError:
            bound.close()
            raise
        bound.setblocking(False)
        return bound


_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 429: "Too Many Requests", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout",
}  # fmt: skip
