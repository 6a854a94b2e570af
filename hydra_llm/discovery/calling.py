"""One HTTP question to an address, at a pace and within limits.

Not httpx: what has no redirects, proxies, cookies or credentials in it cannot follow, use or
send any. Each question has a connection of its own, and takes its turn for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import h11

from hydra_llm.networks import Address

__all__ = ["Caller", "Limits", "NoAnswerError", "Pace", "Reply"]

READ_BYTES = 65536

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[object]]


class Limits(NamedTuple):
    """How much a search asks of the network and of this machine."""

    rate: float = 50.0
    """Connections that are begun in one second."""
    concurrency: int = 64
    """Connections at a time."""
    connect_seconds: float = 1.0
    """To accept one; where nobody is, that is what an address costs."""
    answer_seconds: float = 3.0
    """From the question to the answer's last byte."""


class NoAnswerError(Exception):
    """Nobody is there, or nobody who can be understood."""


class Reply(NamedTuple):
    """An answer in HTTP."""

    status: int
    body: bytes


class Pace:
    """
    Lets through so many in a second, one after the other: no bursts, and nothing saved up.

    Args:
        rate: how many.
        clock: in seconds.
        sleep: waits for so many of them.
    """

    def __init__(self, rate: float, *, clock: Clock = time.monotonic, sleep: Sleep) -> None:
        self._between = 1.0 / rate
        self._clock = clock
        self._sleep = sleep
        self._next = float("-inf")

    async def turn(self) -> None:
        """Wait until it is one's turn."""
        now = self._clock()
        mine = max(now, self._next)
        self._next = mine + self._between
        if mine > now:
            await self._sleep(mine - now)


class Caller:
    """
    Asks addresses.

    Args:
        limits: how fast and how many at a time.
        clock: of the pace.
        sleep: as :func:`asyncio.sleep`.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.limits = Limits() if limits is None else limits
        self._pace = Pace(self.limits.rate, clock=clock, sleep=sleep)
        self._room = asyncio.Semaphore(self.limits.concurrency)

    async def get(self, address: Address, port: int, path: str, *, most_bytes: int) -> Reply:
        """
        Ask, and read the whole answer.

        Raises:
            NoAnswerError: nothing else.
        """
        async with self._room:
            await self._pace.turn()
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(str(address), port, limit=READ_BYTES),
                    self.limits.connect_seconds,
                )
            except (OSError, asyncio.TimeoutError):
                raise NoAnswerError from None
            try:
                return await asyncio.wait_for(
                    _exchange(reader, writer, url_host(address, port), path, most_bytes),
                    self.limits.answer_seconds,
                )
            except (OSError, asyncio.TimeoutError, h11.RemoteProtocolError):
                raise NoAnswerError from None
            finally:
                # Nothing is left to say: closing must not wait for somebody who does not read.
                writer.transport.abort()
                with suppress(OSError):
                    await writer.wait_closed()


def url_host(address: Address, port: int) -> str:
    """``192.168.1.20:11434``, ``[fd00::20]:11434``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    path: str,
    most_bytes: int,
) -> Reply:
    http = h11.Connection(h11.CLIENT)
    # A compressed body could be far larger than it looks.
    headers = [
        ("Host", host),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "hydra-llm discover"),
        ("Connection", "close"),
    ]
    writer.write(http.send(h11.Request(method="GET", target=path, headers=headers)) or b"")
    http.send(h11.EndOfMessage())
    await writer.drain()
    status, body = 0, bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > most_bytes:
                raise h11.RemoteProtocolError("more than anybody asked for")
        elif isinstance(event, h11.EndOfMessage):
            return Reply(status, bytes(body))
        elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("no whole answer")
