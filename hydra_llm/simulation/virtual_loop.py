"""An event loop whose time is counted, not waited for."""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

__all__ = ["VirtualLoop"]

_PATIENCE_S = 0.001
"""How long a turn waits, in real time, for what a thread may bring."""
_STUCK_S = 10.0
_MOST_TURNS = 1_000_000
"""Turns of the loop in one instant: more go round in circles."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """
    Where nothing is ready the clock jumps to the next timer.

    ::

        loop = VirtualLoop()
        loop.run_until_complete(asyncio.sleep(86_400))  # at once
        loop.time()  # 86400.0

    While a function runs in a thread (``run_in_executor``, ``asyncio.to_thread``) the clock
    stands still, as its work takes no virtual time.

    Raises:
        RuntimeError: everybody waits for something that cannot come, or time stands still
            because something is done again and again.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._jumper = _Jumper(self)
        super().__init__(self._jumper)
        # Else a timer might be called a little early: as much as a real clock is coarse.
        self._clock_resolution = 1e-9
        self.threads = 0
        """Functions that run in threads now."""
        self._running_in: int | None = None

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def run_forever(self) -> None:
        """Run until it is stopped."""
        self._running_in = threading.get_ident()
        try:
            super().run_forever()
        finally:
            self._running_in = None

    def call_soon_threadsafe(  # type: ignore[override]  # typeshed's is generic over *args
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Call soon; without the way over a socket where that is not needed."""
        if threading.get_ident() == self._running_in:
            return self.call_soon(callback, *args, context=context)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]  # typeshed's is generic over *args
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run a function in a thread; the clock waits for it."""
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._came_back)
        return future

    def _came_back(self, _: asyncio.Future[Any]) -> None:
        self.threads -= 1


class _Jumper(selectors.DefaultSelector):
    """Does not wait for sockets, of which there is only the loop's own, but lets time pass."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0.0:
            self._turns += 1
            if self._turns > _MOST_TURNS:
                self._turns = 0
                raise RuntimeError(f"virtual time stands still at {self._loop.time()} s")
            return super().select(0)
        self._turns = 0
        if self._loop.threads:
            return super().select(_PATIENCE_S)
        if timeout is None:
            return self._what_comes_from_outside()
        found = super().select(0)
        if not found:
            self._loop.jump(timeout)
        return found

    def _what_comes_from_outside(self) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(_STUCK_S)
        if not found:
            raise RuntimeError("in the virtual world everybody waits, and no timer is set")
        return found
