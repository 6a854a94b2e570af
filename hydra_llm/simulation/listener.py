"""The port of a simulated node."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol

__all__ = ["Listener"]

_MAX_FILLERS = 512
_FILLED_S = 0.02
"""A connection that is not made in this time, on loopback, never will be."""


class Runs(Protocol):
    """What a coroutine can be given to, as a `LoopThread` is."""

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it, now or soon."""


class Listener:
    """
    A port that can be closed to clients and yet stay ours.

    ::

        refusing ──listen──▶ listening ──refuse──▶ refusing
            │                  │  ▲
            │               silence listen
            │                  ▼  │
            ├──────silence──▶ silent ──refuse──▶ refusing
            └────────close───────┴──▶ closed

    A silent port does not answer whoever wants to connect: its queue of connections nobody
    accepts is kept full, by connections of our own.

    To listen takes a turn of the loop, and is never broken off in the middle: the loop would go
    on watching a socket that is closed, and take the next one of that number for it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._socket = self._bind(port)
        self.port = int(self._socket.getsockname()[1])
        self._server: asyncio.Server | None = None
        self._wanted: Literal["listening", "refusing", "silent", "closed"] = "refusing"
        self._is_starting = False
        self._fillers: list[socket.socket] = []

    def listen(self, thread: Runs, make: Callable[[], asyncio.Protocol]) -> None:
        """Let clients in: now, or from the loop's own thread in a moment."""
        self._wanted = "listening"
        thread.run(self._start(make))

    async def _start(self, make: Callable[[], asyncio.Protocol]) -> None:
        if self._is_starting or self._server is not None or self._wanted != "listening":
            return
        self._is_starting = True
        self._empty()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(make, sock=self._socket)
        self._is_starting = False
        self._settle()

    def refuse(self) -> None:
        """Let nobody in: bound but not listening, so that the port is not lost."""
        self._wanted = "refusing"
        self._settle()

    def silence(self) -> None:
        """
        Let nobody in and say nothing: who wants to connect runs into a timeout.

        Raises:
            NotImplementedError: where a full queue refuses connections, as on Windows.
        """
        if sys.platform == "win32":
            raise NotImplementedError("Windows refuses what does not fit a port's queue")
        self._wanted = "silent"
        self._settle()

    @property
    def is_silent(self) -> bool:
        """Whether it lets nobody in and says nothing."""
        return self._wanted == "silent"

    def close(self) -> None:
        """Give the port back."""
        self._wanted = "closed"
        self._settle()

    def _settle(self) -> None:
        if self._is_starting or self._wanted == "listening":
            return
        if self._server is not None:
            server, self._server = self._server, None
            # A second descriptor keeps the port listening, without a moment of refusal.
            kept = self._socket.dup() if self._wanted == "silent" else None
            self._stop(server)
            if kept is not None:
                self._socket = kept
            elif self._wanted == "refusing":
                self._socket = self._bind(self.port)
        elif self._fillers and self._wanted == "refusing":
            self._socket.close()
            self._socket = self._bind(self.port)
        self._empty()
        if self._wanted == "silent":
            self._fill()
        elif self._wanted == "closed":
            self._socket.close()

    def _fill(self) -> None:
        """Fill the queue, which Linux and macOS then drop requests to connect for."""
        self._socket.listen(0)
        to = self._socket.getsockname()
        while len(self._fillers) < _MAX_FILLERS:
            filler = socket.socket(self._socket.family, socket.SOCK_STREAM)
            filler.setblocking(False)
            self._fillers.append(filler)
            filler.connect_ex(to)
            if not select.select([], [filler], [], _FILLED_S)[1]:
                return
        raise NotImplementedError("the queue of a port has no end on this system")

    def _empty(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()

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
