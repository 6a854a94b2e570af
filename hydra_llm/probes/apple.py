"""Memory that the GPU of a Mac with Apple silicon may take of the memory it shares.

Metal tells it as ``recommendedMaxWorkingSetSize``; asking Metal takes a framework, so it is
worked out here: as reported, two thirds of the memory up to 36 GiB and three quarters above,
unless ``sysctl iogpu.wired_limit_mb`` sets another limit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from hydra_llm.probes.host import read_uncut
from hydra_llm.types import Device, HostMemory

__all__ = ["AppleReader"]

ASKED = ("hw.memsize", "hw.optional.arm64", "machdep.cpu.brand_string", "iogpu.wired_limit_mb")
COMMAND = ("/usr/sbin/sysctl", *ASKED)

ASK_AGAIN_SECONDS = 60.0
"""The limit changes when somebody sets it; a program a second to see that is too much."""

COMMAND_SECONDS = 2.0

_GIB = 1 << 30

Run = Callable[[Sequence[str]], str]


class AppleReader:
    """
    Reads the GPU again and again.

    Args:
        run: runs a command and returns what it prints.
        host: reads the memory that the GPU shares.
        platform: as :data:`sys.platform`.
    """

    def __init__(
        self,
        run: Run | None = None,
        host: Callable[[float], HostMemory] = read_uncut,
        platform: str = sys.platform,
    ) -> None:
        self._run = _run if run is None else run
        self._host = host
        self._platform = platform
        self._told: dict[str, str] = {}
        self._ask_at = float("-inf")

    def read(self, now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        """The GPU, or why there is none. Never raises."""
        if self._platform != "darwin":
            return (), ()
        if now >= self._ask_at:
            try:
                self._told = dict(re.findall(r"(?m)^([\w.]+): (.*)$", self._run(COMMAND)))
            except Exception as error:  # whatever running a program may raise
                return (), (f"Apple: sysctl: {type(error).__name__}",)
            self._ask_at = now + ASK_AGAIN_SECONDS
        if self._told.get("hw.optional.arm64") != "1":
            return (), ("Apple: no Apple silicon",)
        host = self._host(now)
        limit = self._limit_bytes(host.total_bytes)
        if limit is None:
            return (), ("Apple: sysctl does not tell how much memory there is",)
        return (self._device(limit, host, now),), ()

    def close(self) -> None:
        """Nothing is held between two readings."""

    def _limit_bytes(self, host_total: int | None) -> int | None:
        """What the GPU may take; 0 in ``iogpu.wired_limit_mb`` leaves it to the system."""
        set_by_hand = self._number("iogpu.wired_limit_mb")
        if set_by_hand:
            return set_by_hand << 20
        total = self._number("hw.memsize") or host_total
        if not total:
            return None
        return total * 2 // 3 if total <= 36 * _GIB else total * 3 // 4

    def _number(self, name: str) -> int | None:
        text = self._told.get(name, "")
        return int(text) if text.isdecimal() else None

    def _device(self, limit: int, host: HostMemory, now: float) -> Device:
        available = host.available_bytes
        return Device(
            key="apple:0",
            vendor="apple",
            kind="unified",
            total_bytes=limit,
            free_bytes=None if available is None else min(limit, available),
            name=self._told.get("machdep.cpu.brand_string", ""),
            source="sysctl + host memory",
            observed_at=now,
        )


def _run(command: Sequence[str]) -> str:
    # It leaves with 1 if one of the names is not known to it, and tells the others.
    return subprocess.run(  # noqa: S603  a fixed command
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    ).stdout
