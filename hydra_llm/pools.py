"""Connections to the nodes: one sync pool, and one async pool per live event loop.

They belong to the router, so that a thousand clients of it share their connections and one
TLS context (building one takes 20 to 50 ms).
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

import httpcore
import httpx

from hydra_llm.exceptions import ConfigurationError
from hydra_llm.patience import AsyncPatientBackend, PatientBackend
from hydra_llm.world import World

LIMITS: dict[str, Any] = {
    # The scheduler decides how much a node gets; a pool limit would only queue blindly.
    "max_connections": None,
    "max_keepalive_connections": 100,
    "keepalive_expiry": 30.0,
}


class _SyncPool(httpx.HTTPTransport):
    """httpx's transport over connections that know a :class:`hydra_llm.patience.Patience`."""

    def __init__(self, context: ssl.SSLContext) -> None:
        # Not its parent's: that has no place for a backend.
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            **LIMITS,
            network_backend=PatientBackend(),
        )


class _AsyncPool(httpx.AsyncHTTPTransport):
    """As :class:`_SyncPool`, for an event loop."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            **LIMITS,
            network_backend=AsyncPatientBackend(),
        )


class Pools:
    """
    Opened when first used.

    Args:
        verify: True for the usual authorities, a CA file, False for none, or a TLS context.
        world: what stands in for the network; there are no pools then.
    """

    def __init__(
        self, *, verify: bool | str | ssl.SSLContext = True, world: World | None = None
    ) -> None:
        self._verify = verify
        self._world = world
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._sync: httpx.HTTPTransport | None = None
        self._async: dict[
            asyncio.AbstractEventLoop,
            tuple[httpx.AsyncHTTPTransport, AsyncGenerator[None, None]],
        ] = {}
        self._process = os.getpid()
        self._dropped: deque[httpx.Response] = deque()

    def ssl_context(self) -> ssl.SSLContext:
        """The TLS context that all pools share."""
        if self._context is None:
            if isinstance(self._verify, ssl.SSLContext):
                self._context = self._verify
            elif isinstance(self._verify, str):
                self._context = ssl.create_default_context(cafile=self._verify)
            else:
                self._context = httpx.create_ssl_context(verify=self._verify)
        return self._context

    def sync(self) -> httpx.HTTPTransport:
        """The pool of the sync doors; any thread may use it."""
        if self._world is not None:
            raise ConfigurationError(
                "a router in a world of its own has async doors only: use AsyncClient or "
                "AsyncHydraTransport"
            )
        if self._process != os.getpid():
            self._forget_the_parents()
        pool = self._sync
        if pool is None:
            with self._lock:
                if self._sync is None:
                    self._sync = _SyncPool(self.ssl_context())
                pool = self._sync
        return pool

    async def of_this_loop(self) -> httpx.AsyncBaseTransport:
        """The pool of the running event loop."""
        if self._world is not None:
            return self._world.transport
        if self._process != os.getpid():
            self._forget_the_parents()
        loop = asyncio.get_running_loop()
        held = self._async.get(loop)
        if held is not None:
            return held[0]
        with self._lock:
            # A closed loop's pool cannot be closed any more, only be let go of.
            for other in [other for other in self._async if other.is_closed()]:
                del self._async[other]
            pool = _AsyncPool(self.ssl_context())
            guard = self._until_the_loop_ends(loop, pool)
            self._async[loop] = (pool, guard)
        # Started once, it is closed by `loop.shutdown_asyncgens()`, which asyncio.run() calls.
        await guard.__anext__()
        return pool

    async def _until_the_loop_ends(
        self, loop: asyncio.AbstractEventLoop, pool: httpx.AsyncHTTPTransport
    ) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with self._lock:
                self._async.pop(loop, None)
            await pool.aclose()

    def drop(self, response: httpx.Response, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """
        Close an answer that nobody reads any more, soon: httpcore keeps its connection for ever.

        For finalizers, which run in any thread and in the middle of anything.

        Args:
            response: what was left.
            loop: whose pool it is of; None for the sync one, see :meth:`close_dropped`.
        """
        if loop is None:
            self._dropped.append(response)
            return
        with suppress(RuntimeError):  # the loop is closed, and its sockets with it
            loop.call_soon_threadsafe(_close_soon, loop, response)

    def close_dropped(self) -> None:
        """Close what :meth:`drop` was given of the sync pool."""
        while self._dropped:
            with suppress(IndexError, httpx.HTTPError, OSError):
                self._dropped.popleft().close()

    def _forget_the_parents(self) -> None:
        """After a fork the sockets are the parent's: neither use nor close them."""
        with self._lock:
            self._sync, self._async, self._process = None, {}, os.getpid()
            self._dropped.clear()

    def close(self) -> None:
        """Close the sync pool, and the async pools as far as their loops can still do it."""
        with self._lock:
            pool, self._sync = self._sync, None
            guards = [(loop, guard) for loop, (_, guard) in self._async.items()]
        if pool is not None:
            pool.close()
        for loop, guard in guards:
            if loop.is_running() and not _is_this_loop(loop):
                asyncio.run_coroutine_threadsafe(guard.aclose(), loop)
            elif loop.is_running():
                loop.create_task(guard.aclose())

    async def aclose(self) -> None:
        """Close everything, this loop's pool for certain."""
        with self._lock:
            held = self._async.pop(asyncio.get_running_loop(), None)
        if held is not None:
            await held[1].aclose()
        self.close()


_closing: set[asyncio.Task[None]] = set()
"""A loop itself remembers its tasks weakly."""


def _close_soon(loop: asyncio.AbstractEventLoop, response: httpx.Response) -> None:
    async def close() -> None:
        with suppress(httpx.HTTPError, OSError):
            await response.aclose()

    task = loop.create_task(close())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


class HandshakeGuard:
    """
    Closes the connection below a TLS handshake that was given up.

    httpcore 1.0 does so when the handshake fails, but not when it is cancelled; each
    request that is given up at a node hanging there would leave a socket open. Pass one as
    the request extension ``trace``.
    """

    def __init__(self) -> None:
        self._connection: Any = None  # httpcore's stream

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        """Take notice of one of httpcore's events."""
        if event == "connection.connect_tcp.complete":
            self._connection = info["return_value"]
        elif event == "connection.start_tls.failed" and self._connection is not None:
            await self._connection.aclose()


def _is_this_loop(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
