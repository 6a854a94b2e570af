"""How long one waits for a node altogether, although a byte comes now and then.

httpx limits each single silence. A node that sends one byte a second is never silent for long,
and its answer may take for ever. :class:`Patience` is a read time-out that has an end as well;
the backends here are httpcore's own, whose connections look at it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore

__all__ = ["AsyncPatientBackend", "Patience", "PatientBackend"]


class Patience(float):
    """
    A read time-out in seconds, and a time at which it is over in any case.

    It is the same object from a request's first byte to its last; who waits for the next part
    moves its end with :meth:`begin`.
    """

    __slots__ = ("_clock", "_ends", "_paused_at")

    def __new__(cls, silence: float, clock: Callable[[], float]) -> Patience:
        """Wait ``silence`` seconds for each read; ``clock`` gives monotonic seconds."""
        made = super().__new__(cls, silence)
        made._clock = clock
        made._ends = float("inf")
        made._paused_at = 0.0
        return made

    _clock: Callable[[], float]
    _ends: float
    _paused_at: float

    def begin(self, seconds: float) -> None:
        """The next part has to be here, as a whole, within so many seconds from now."""
        self._ends = self._clock() + seconds

    def ends_with(self, other: float | None) -> None:
        """The first part has to be here when another one's time is over."""
        if isinstance(other, Patience):
            self._ends = other._ends

    def pause(self) -> None:
        """Whoever reads does something else: that time is not the node's."""
        self._paused_at = self._clock()

    def go_on(self) -> None:
        """Go on after :meth:`pause`."""
        self._ends += self._clock() - self._paused_at

    def left(self) -> float:
        """Seconds for one more read; not more than the silence that is allowed."""
        return min(float(self), self._ends - self._clock())


def _left(timeout: float | None) -> float | None:
    if not isinstance(timeout, Patience):
        return timeout
    left = timeout.left()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, _left(timeout))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _AsyncStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class PatientBackend(httpcore.SyncBackend):
    """Makes connections whose reads know a :class:`Patience`."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """As httpcore's."""
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options))


class AsyncPatientBackend(httpcore.AsyncNetworkBackend):
    """As :class:`PatientBackend`, for an event loop."""

    def __init__(self) -> None:
        # For type checkers there is none without anyio, which httpx brings.
        backend: Any = httpcore.AnyIOBackend()
        self._backend: httpcore.AsyncNetworkBackend = backend

    async def sleep(self, seconds: float) -> None:
        """As httpcore's."""
        await self._backend.sleep(seconds)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """As httpcore's."""
        stream = await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return _AsyncStream(stream)
