"""An event loop on which time passes faster than in life."""

from __future__ import annotations

import asyncio
import select
import selectors
import time

__all__ = ["FastClock", "FastLoop"]


class FastClock:
    """
    Seconds that are shorter than real ones, from 0 on.

    ::

        clock = FastClock(20)
        time.sleep(1)
        clock.now()  # 20.0

    Args:
        speed: seconds of this clock in a real one.
    """

    def __init__(self, speed: float) -> None:
        if not speed > 0.0:
            raise ValueError(f"speed should be above 0, not {speed!r}")
        self.speed = speed
        self._began, self._wall_began = time.monotonic(), time.time()

    def now(self) -> float:
        """Seconds since it was made; they never go back."""
        return (time.monotonic() - self._began) * self.speed

    def wall_now(self) -> float:
        """Seconds since 1970, right when the clock was made and fast since then."""
        return self._wall_began + self.now()


class FastLoop(asyncio.SelectorEventLoop):
    """
    An event loop with real sockets, whose timers go by a `FastClock`.

    Timeouts of libraries that ask the loop for the time, as httpx and anyio do, are of that clock
    too. Several loops may share one.
    """

    def __init__(self, clock: FastClock) -> None:
        self._fast = clock
        super().__init__(_Selector(clock.speed))

    def time(self) -> float:
        """Seconds of the clock."""
        return self._fast.now()


class _Selector(selectors.DefaultSelector):
    """Waits in real seconds, and no millisecond longer."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed
        own = getattr(self, "fileno", None)  # Windows' has none
        self._own: list[int] = [] if own is None else [own()]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0.0:
            return super().select(timeout)
        seconds = timeout / self._speed
        if not self._own:
            return super().select(seconds)
        # epoll rounds up to whole milliseconds, which are `speed` of them here; select does not.
        select.select(self._own, (), (), seconds)
        return super().select(0)
