"""Memory of this machine's AMD GPUs, as Linux's own driver tells it in ``/sys``: no ROCm needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hydra_llm.probes.host import read_uncut
from hydra_llm.types import Device, HostMemory

__all__ = ["AmdReader"]

AMD = "0x1002"

_GIB = 1 << 30
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class _Pool(NamedTuple):
    """One kind of memory."""

    total: int
    used: int

    @property
    def free(self) -> int:
        return max(0, self.total - self.used)


class AmdReader:
    """
    Reads the GPUs again and again.

    Args:
        root: where ``sys`` lies.
        host: reads the memory that an integrated GPU shares.
    """

    def __init__(
        self, root: Path = Path("/"), host: Callable[[float], HostMemory] = read_uncut
    ) -> None:
        self._cards = root / "sys/class/drm"
        self._host = host

    def read(self, now: float) -> tuple[tuple[Device, ...], tuple[str, ...]]:
        """The devices, and why there are fewer than one might expect. Never raises."""
        devices: list[Device] = []
        reasons: list[str] = []
        for card in self._amd_cards(reasons):
            key = _key(card)
            try:
                devices.append(self._device(card, key, now))
            except FileNotFoundError:
                reasons.append(f"AMD: {key}: the driver amdgpu does not run it")
            except (OSError, ValueError) as error:
                reasons.append(f"AMD: {key}: {_meaning(error)}")
                devices.append(Device(key=key, vendor="amd", source="sysfs", observed_at=now))
        return tuple(devices), tuple(reasons)

    def close(self) -> None:
        """Nothing is held between two readings."""

    def _amd_cards(self, reasons: list[str]) -> Iterator[Path]:
        """The folder of each AMD card, in the order of their numbers."""
        try:
            # card0 is a card, card0-DP-1 a socket of it.
            names = [one.name for one in self._cards.iterdir() if one.name[4:].isdecimal()]
        except FileNotFoundError:  # no Linux, or no graphics at all
            return
        except OSError as error:
            reasons.append(f"AMD: {_meaning(error)}")
            return
        for name in sorted(names, key=lambda name: int(name[4:])):
            card = self._cards / name / "device"
            if name.startswith("card") and _text(card / "vendor") == AMD:
                yield card

    def _device(self, card: Path, key: str, now: float) -> Device:
        memory, shared = _pool(card, "vram"), _shared(card)
        device = Device(
            key=key,
            vendor="amd",
            total_bytes=memory.total,
            used_bytes=memory.used,
            free_bytes=memory.free,
            utilization=_busy(card),
            name=_text(card / "product_name") or f"AMD GPU {_text(card / 'device')}".rstrip(),
            source="sysfs",
            observed_at=now,
        )
        if shared is None or not is_integrated(memory.total, shared.total):
            return device
        return self._integrated(device, memory, shared, now)

    def _integrated(self, device: Device, memory: _Pool, shared: _Pool, now: float) -> Device:
        """One that takes system memory too; of that there is no more free than is available."""
        available = self._host(now).available_bytes
        more = shared.free if available is None else min(shared.free, available)
        return Device(
            key=device.key,
            vendor="amd",
            kind="unified",
            total_bytes=memory.total + shared.total,
            used_bytes=memory.used + shared.used,
            free_bytes=memory.free + more,
            utilization=device.utilization,
            name=device.name,
            source="sysfs + host memory",
            observed_at=now,
        )


def is_integrated(vram_bytes: int, gtt_bytes: int) -> bool:
    """Whether a GPU lives off system memory (GTT), by the test that Ollama makes."""
    return vram_bytes <= 4 * _GIB and gtt_bytes >= 8 * _GIB and gtt_bytes >= 4 * vram_bytes


def _key(card: Path) -> str:
    """Its serial number as ROCm writes it, else where it is plugged in."""
    serial = _text(card / "unique_id")
    if serial.strip("0"):
        return f"GPU-{serial}"
    address = card.resolve().name
    return f"amd:{address if _PCI_ADDRESS.fullmatch(address) else card.parent.name}"


def _pool(card: Path, name: str) -> _Pool:
    total = int((card / f"mem_info_{name}_total").read_text())
    return _Pool(total, int((card / f"mem_info_{name}_used").read_text()))


def _shared(card: Path) -> _Pool | None:
    try:
        return _pool(card, "gtt")
    except (OSError, ValueError):
        return None


def _busy(card: Path) -> float | None:
    percent = _text(card / "gpu_busy_percent")
    return int(percent) / 100 if percent.isdecimal() and int(percent) <= 100 else None


def _text(file: Path) -> str:
    """What a file that need not be there says; empty without it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _meaning(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "no number"
