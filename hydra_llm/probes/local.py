"""This machine's memory: of its GPUs, from all that know some, and of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from hydra_llm.probes.amd import AmdReader
from hydra_llm.probes.apple import AppleReader
from hydra_llm.probes.host import read_uncut
from hydra_llm.probes.nvml import NvmlReader
from hydra_llm.types import Device, HostMemory

__all__ = ["DeviceReader", "LocalDevices", "LocalMemory", "LocalReading"]

FRESH_SECONDS = 1.0


class DeviceReader(Protocol):
    """One source of GPUs."""

    def read(self, now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        """The devices, and why there are fewer than one might expect. Never raises."""
        ...

    def close(self) -> None:
        """Let go of what it holds. Safe to call twice."""
        ...


class LocalDevices:
    """
    This machine's GPUs, from every source that knows some: NVML, then AMD's driver, then Apple's.

    A machine without a source's hardware is no reason, one whose hardware cannot be read is.
    """

    def __init__(self, readers: Sequence[DeviceReader] | None = None) -> None:
        self._readers = (
            (NvmlReader(), AmdReader(), AppleReader()) if readers is None else tuple(readers)
        )

    def read(self, now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        """The devices, and why there are fewer than one might expect. Never raises."""
        devices: list[Device] = []
        reasons: list[str] = []
        for reader in self._readers:
            try:
                found, why = reader.read(now)
            except Exception as error:  # no source may take the others with it
                found, why = (), (f"{type(reader).__name__}: {type(error).__name__}",)
            devices += found
            reasons += why
        return _without_idle(devices, reasons), tuple(reasons)

    def close(self) -> None:
        """Let go of every source."""
        for reader in self._readers:
            with suppress(Exception):
                reader.close()


def _without_idle(devices: Sequence[Device], reasons: list[str]) -> tuple[Device, ...]:
    """Leave out an integrated AMD GPU that stands beside another one: Ollama does not use it."""
    used = [one for one in devices if not (one.vendor == "amd" and one.kind == "unified")]
    if not used:
        return tuple(devices)
    reasons += [
        f"AMD: {one.key}: integrated, left out beside another GPU"
        for one in devices
        if one not in used
    ]
    return tuple(used)


class LocalReading(NamedTuple):
    """What was found; None was not looked for, or did not come in time."""

    devices: tuple[Device, ...] | None = None
    host: HostMemory | None = None
    reasons: tuple[str, ...] = ()
    """Why a source gave nothing."""
    observed_at: float | None = None


class LocalMemory:
    """
    Memory of this machine's GPUs and of itself, for all nodes that run on it.

    A reading serves for a while. One that hangs, as calls into a driver may, is waited for
    no longer than asked, and no second one is begun beside it.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        reader: DeviceReader | None = None,
        host: Callable[[float], HostMemory] = read_uncut,
        fresh_seconds: float = FRESH_SECONDS,
    ) -> None:
        self._clock = clock
        self._reader = LocalDevices() if reader is None else reader
        self._host = host
        self._fresh_seconds = fresh_seconds
        self._reading = LocalReading()
        self._read_at: float | None = None
        self._pending: asyncio.Future[LocalReading] | None = None

    async def read(self, timeout_seconds: float) -> LocalReading:
        """What was read a moment ago, or what is read now; empty if neither."""
        if self._read_at is not None and self._clock() - self._read_at < self._fresh_seconds:
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
        return LocalReading(devices, self._host(now), reasons, now)

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
