"""HTTP/1.1 for simulated nodes: asyncio and h11 on a thread of their own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any, Protocol, TypeVar

import h11

from hydra_llm.simulation.dripping import Drops
from hydra_llm.simulation.fast_loop import FastClock, FastLoop
from hydra_llm.simulation.listener import Listener
from hydra_llm.simulation.tls import Tls
from hydra_llm.simulation.wire import Reply

__all__ = ["Connection", "Handler", "LoopThread"]

_T = TypeVar("_T")
_CLOSING_S = 5.0
_UNREAD_BYTES = 65536
"""What may wait for a client before it counts as one that does not read."""
_LAST_TURNS = 5
"""Turns of the loop from accepting a connection to having lost it."""


class LoopThread:
    """An event loop on a thread; several nodes may share one, and it may be fast."""

    def __init__(self, name: str = "simulated-ollama", *, clock: FastClock | None = None) -> None:
        self.clock = time.monotonic if clock is None else clock.now
        self.wall_clock = time.time if clock is None else clock.wall_now
        self.loop = asyncio.new_event_loop() if clock is None else FastLoop(clock)
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
    tls: ssl.SSLContext | None

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
        self._tls: Tls | None = None
        self._drops = Drops(self)

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
        if self._handler.tls is not None:
            self._tls = Tls(self._handler.tls)
        self._handler.opened(self)

    def data_received(self, data: bytes) -> None:
        """Read on; a frozen node reads nothing."""
        if self._handler.is_frozen:
            self._held += data
            return
        if self._tls is not None:
            try:
                data = self._tls.decrypt(data)
            except ssl.SSLError:
                self._put(self._tls.pending())  # an alert
                self._close()
                return
            self._put(self._tls.pending())
        if data:
            self._http.receive_data(data)
            self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._transport = None
        self._drops.stop()
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
        self._drops.head_is_out()

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self._write(h11.Data(data=data))

    def finish(self) -> None:
        """End the answer, and serve the next request if the connection stays."""
        self._write(h11.EndOfMessage())
        if self._transport is None:
            return
        if self._http.our_state is h11.MUST_CLOSE or self._http.their_state is h11.MUST_CLOSE:
            self._close()
            return
        self._drops.last_is_out()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._read()

    def drip(self, pause_s: float, *, spare_head: bool) -> None:
        """Send the rest of this answer byte by byte, with a pause before each."""
        is_head_out = self._http.our_state is h11.SEND_BODY
        self._drops.start(pause_s, wait_for_head=spare_head and not is_head_out)

    @property
    def is_clogged(self) -> bool:
        """Whether the client does not read what it is sent."""
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() > _UNREAD_BYTES

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
                self._close()
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
            self._put(data if self._tls is None else self._tls.encrypt(data))

    def _put(self, data: bytes) -> None:
        if not self._drops.take(data):
            self.write(data)

    def write(self, data: bytes) -> None:
        """Put bytes on the wire as they are."""
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _close(self) -> None:
        """Close in order, once everything has been sent."""
        if self._drops.close_after():
            return
        self.close()

    def close(self) -> None:
        """Close in order."""
        if self._tls is not None:
            self.write(self._tls.farewell())
        if self._transport is not None:
            self._transport.close()

    @property
    def is_frozen(self) -> bool:
        """Whether the node stands still."""
        return self._handler.is_frozen


_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 429: "Too Many Requests", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout",
}  # fmt: skip
