"""Answers that go out byte by byte."""

from __future__ import annotations

import asyncio
from typing import Literal, Protocol

__all__ = ["Drops"]


class _Wire(Protocol):
    """The connection the bytes belong to."""

    @property
    def is_frozen(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class Drops:
    """What of an answer is held back, to go out byte by byte."""

    def __init__(self, connection: _Wire) -> None:
        self._connection = connection
        self._pause_s: float | None = None
        self._waits_for_head = False
        self._held = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._then: Literal["go on", "end", "close"] = "go on"

    def start(self, pause_s: float, *, wait_for_head: bool) -> None:
        """Hold back all that comes, or all after the head."""
        self._pause_s, self._waits_for_head, self._then = pause_s, wait_for_head, "go on"

    def head_is_out(self) -> None:
        """Begin, if the head was all one waited for."""
        self._waits_for_head = False

    def last_is_out(self) -> None:
        """Know that the answer is complete: with its last byte all is as usual again."""
        self._then = "end"
        self._settle()

    def close_after(self) -> bool:
        """Close the connection with the last byte; say whether there is one to wait for."""
        self._then = "close"
        return bool(self._held)

    def take(self, data: bytes) -> bool:
        """Hold bytes back, if that is what is to be done."""
        if self._pause_s is None or self._waits_for_head:
            return False
        self._held += data
        if self._timer is None and self._held:
            self._set_timer(self._pause_s)
        return True

    def stop(self) -> None:
        """Forget all about it: there is nobody left."""
        self._pause_s = None
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, pause_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._drop)

    def _drop(self) -> None:
        self._timer = None
        if self._held and not self._connection.is_frozen:
            self._connection.write(bytes(self._held[:1]))
            del self._held[:1]
        self._settle()
        if self._pause_s is not None and self._held:
            self._set_timer(self._pause_s)

    def _settle(self) -> None:
        if self._held or self._then == "go on":
            return
        self._pause_s = None
        if self._then == "close":
            self._connection.close()
