"""Where simulated nodes live: on real sockets and in real time, or in a virtual world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from hydra_llm.simulation.listener import Runs

__all__ = ["Port", "Stage"]

_T = TypeVar("_T")


class Port(Protocol):
    """An address that clients can be let in at, or not."""

    @property
    def port(self) -> int:
        """Its number."""
        ...

    def listen(self, thread: Runs, make: Callable[[], asyncio.Protocol]) -> None:
        """Let clients in: now, or in a moment."""

    def refuse(self) -> None:
        """Let nobody in, and keep the number."""

    def silence(self) -> None:
        """Let nobody in and say nothing."""

    @property
    def is_silent(self) -> bool:
        """Whether it lets nobody in and says nothing."""
        ...

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
