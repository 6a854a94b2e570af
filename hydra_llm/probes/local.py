"""This machine's memory, read away from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from hydra_llm.probes.host import read_uncut
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.types import Device, HostMemory

__all__ = ["LocalMemory", "LocalReading"]

FRESH_SECONDS = 1.0


class LocalReading(NamedTuple):
    """What was found; None was not looked for, or did not come in time."""

    devices: tuple[Device, ...] | None = None
    host: HostMemory | None = None
    reasons: tuple[str, ...] = ()
    """Why a source gave nothing."""


class LocalMemory:
    """
    Memory of this machine's GPUs and of itself, for all nodes that run on it.

    A reading serves for a second. One that hangs, as calls into a driver may, is waited for
    no longer than asked, and no second one is begun beside it.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        reader: NvmlReader | None = None,
        host: Callable[[float], HostMemory] = read_uncut,
    ) -> None:
        self._clock = clock
        self._reader = NvmlReader() if reader is None else reader
        self._host = host
        self._reading = LocalReading()
        self._read_at: float | None = None
        self._pending: asyncio.Future[LocalReading] | None = None

    async def read(self, timeout_seconds: float) -> LocalReading:
        """What was read within the last second, or what is read now; empty if neither."""
        if self._read_at is not None and self._clock() - self._read_at < FRESH_SECONDS:
            return self._reading
        if self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.run_in_executor(None, self._read_now)
            self._pending.add_done_callback(self._take)
        done, _ = await asyncio.wait({self._pending}, timeout=timeout_seconds)
        return self._reading if done else LocalReading()

    def _read_now(self) -> LocalReading:
        now = self._clock()
        devices, reasons = self._reader.read(now)
        return LocalReading(devices, self._host(now), reasons)

    def _take(self, read: asyncio.Future[LocalReading]) -> None:
        self._pending = None
        if read.cancelled():
            return
        error = read.exception()
        self._reading = (
            read.result() if error is None else LocalReading(reasons=(type(error).__name__,))
        )
        self._read_at = self._clock()

    def close(self) -> None:
        """Let go of the driver, unless a call into it hangs."""
        if self._pending is None:
            self._reader.close()
        else:
            self._pending.cancel()
