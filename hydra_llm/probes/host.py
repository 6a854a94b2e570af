"""This machine's system memory, from the standard library alone."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import struct
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hydra_llm.types import HostMemory

__all__ = ["read_host"]


class _Memory(NamedTuple):
    total: int | None = None
    available: int | None = None
    source: str = ""


def read_host(now: float, *, limits: bool = True, root: Path = Path("/")) -> HostMemory:
    """
    Total and available memory; None where the system does not tell. Never raises.

    Args:
        now: when this is.
        limits: cut it to what this process's control group may use (Linux).
        root: where ``proc`` and ``sys`` lie.
    """
    try:
        memory = _of_this_system(limits, root)
    except Exception:  # foreign calls; unknown is an answer
        memory = _Memory()
    return HostMemory(
        total_bytes=memory.total,
        available_bytes=memory.available,
        source=memory.source,
        observed_at=now,
    )


def read_uncut(now: float) -> HostMemory:
    """Read what this machine has: our own group's limits are not those of its Ollama."""
    return read_host(now, limits=False)


def _of_this_system(limits: bool, root: Path) -> _Memory:
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        return _Memory(_physical(), _mac_available(), "sysctl")
    memory = _meminfo(root / "proc/meminfo")
    if memory.total is None:
        return _Memory(_physical(), None, "sysconf")
    return _cut(memory, root) if limits else memory


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


# -------------------------------------------------------------------------- Linux


def _meminfo(file: Path) -> _Memory:
    text = _read(file) or ""
    found = {name: int(kib) << 10 for name, kib in re.findall(r"(?m)^(\w+):\s+(\d+) kB$", text)}
    return _Memory(found.get("MemTotal"), found.get("MemAvailable"), "/proc/meminfo")


def _cut(memory: _Memory, root: Path) -> _Memory:
    """The memory, cut to the tightest of the control groups around this process."""
    total, available = memory.total, memory.available
    for limit, used in _control_groups(root):
        if total is not None and limit < total:
            total = limit
            memory = memory._replace(source="/proc/meminfo, cgroup")
        left = max(0, limit - used)
        available = None if available is None else min(available, left)
    return memory._replace(total=total, available=available)


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group with a limit, from this process outwards."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # In a container the path may be that of the host, and only the top be there.
        for folder in (base / group, *(base / up for up in group.parents)):
            limit, used = _number(folder / files[0]), _number(folder / files[1])
            if limit is not None and used is not None:
                yield limit, max(0, used - _reclaimable(folder, files[2]))


def _reclaimable(folder: Path, field: str) -> int:
    """File cache that counts as used and is given up at once."""
    found = re.search(rf"(?m)^{field} (\d+)$", _read(folder / "memory.stat") or "")
    return int(found[1]) if found else 0


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", for version 1's huge number, and without a file."""
    text = (_read(file) or "").strip()
    return int(text) if text.isdecimal() and int(text) < 1 << 60 else None


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return None


# -------------------------------------------------------------------------- macOS

_HOST_VM_INFO64 = 4
_VM_INFO64_WORDS = 38


@lru_cache(maxsize=1)
def _mach_host() -> tuple[ctypes.CDLL, int]:
    # Asked once: each call takes one more reference to the port.
    library = ctypes.CDLL(ctypes.util.find_library("c") or "libc.dylib")
    return library, library.mach_host_self()


def _mac_available() -> int | None:
    """What ``vm_stat`` calls free and inactive: what programs can have without swapping."""
    library, host = _mach_host()
    figures = ctypes.create_string_buffer(4 * _VM_INFO64_WORDS)
    count = ctypes.c_uint32(_VM_INFO64_WORDS)
    if library.host_statistics64(host, _HOST_VM_INFO64, figures, ctypes.byref(count)) != 0:
        return None
    return _free_and_inactive(figures.raw) * os.sysconf("SC_PAGE_SIZE")


def _free_and_inactive(vm_statistics64: bytes) -> int:
    """Pages; the structure begins with free, active, inactive and wired."""
    free, _, inactive, _ = struct.unpack_from("=4I", vm_statistics64)
    return int(free + inactive)


# ------------------------------------------------------------------------ Windows


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX``."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


def _windows() -> _Memory:
    if sys.platform != "win32":
        return _Memory()
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return _Memory()
    return _Memory(int(status.total), int(status.available), "GlobalMemoryStatusEx")
