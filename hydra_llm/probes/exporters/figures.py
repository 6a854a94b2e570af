"""What the pages of several exporters have in common: figures by device, and their gaps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from hydra_llm.probes.exporters.page import Page
from hydra_llm.probes.memory import SHARES_HOST_MEMORY
from hydra_llm.types import Device, DeviceProcess, HostMemory

MIB = 1 << 20

MOST_BYTES = 1 << 46
"""No device has 64 TiB. Above lie the marks that NVIDIA's DCGM puts for "no value": 2^31 - 16
and on in a field of MiB, 2^47 and on, and 2^63 - 14 and on."""

APPLE = re.compile(r"\bApple\b", re.IGNORECASE)

OLLAMAS_PROGRAMS = ("ollama", "llama-server")
"""As the programs' names begin; runners are called ``llama-server`` since 0.30."""

Labels = Mapping[str, str]


class Found(NamedTuple):
    """What one kind of exporter told on a page."""

    devices: tuple[Device, ...] = ()
    host: HostMemory | None = None
    sampled_at: float | None = None
    """Unix time by the exporter's own clock, where it tells."""
    reasons: tuple[str, ...] = ()
    """Why there is less than one might expect."""


@dataclass(slots=True)
class Figures:
    """All rows of one device."""

    labels: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def size(self, name: str, unit: int = 1) -> int | None:
        """A figure in bytes; None without a value that can be."""
        return size_of(self.values.get(name), unit)


def size_of(value: float | None, unit: int = 1) -> int | None:
    """Bytes; None for what is no size: NaN, below zero, a mark for "blank"."""
    if value is None or not 0 <= value * unit < MOST_BYTES:
        return None
    return round(value * unit)


def gathered(
    page: Page,
    metrics: Mapping[str, str],
    key: Callable[[Labels], str | None],
    *,
    adds_up: bool = False,
) -> dict[str, Figures]:
    """
    Rows of some metrics, by device.

    Args:
        page: where they stand.
        metrics: what to call each metric's value, and its name on the page.
        key: the device's key, from a row's labels; a row without one is left out.
        adds_up: whether a device may have several rows of one metric, to be added.
    """
    found: dict[str, Figures] = {}
    for name, metric in metrics.items():
        for row in page.rows(metric):
            device = key(row.labels)
            if not device:
                continue
            figures = found.setdefault(device, Figures())
            figures.labels.update(row.labels)
            before = figures.values.get(name, 0.0) if adds_up else 0.0
            figures.values[name] = before + row.value
    return found


def device_of(
    figures: Figures,
    *,
    key: str,
    vendor: str,
    source: str,
    unit: int = 1,
    kind: Literal["discrete", "mig", "unified"] = "discrete",
    name: str = "",
    busy: float | None = None,
    processes: tuple[DeviceProcess, ...] | None = None,
) -> Device:
    """A device of its figures ``total``, ``used``, ``free``, ``reserved``: two make a third."""
    total, used, free, reserved = (
        figures.size(one, unit) for one in ("total", "used", "free", "reserved")
    )
    if total is None and free is not None and used is not None:
        total = free + used + (reserved or 0)
    if not total:
        # A GPU without memory is one whose memory nobody told: a Jetson says 0.
        total = used = free = reserved = None
    elif free is None and used is not None:
        free = total - used - (reserved or 0)
    if total is not None and free is not None:
        free = min(max(0, free), total)
    return Device(
        key=key,
        vendor=vendor,
        kind=kind,
        total_bytes=total,
        used_bytes=used,
        free_bytes=free,
        reserved_bytes=reserved,
        utilization=busy if busy is not None and 0 <= busy <= 1 else None,
        processes=processes,
        name=name,
        source=source,
    )


def on_host_memory(device: Device, host: HostMemory | None) -> Device:
    """
    The device, with the host's memory if its chip has none of its own.

    Only chips known for it: a card that has fallen off the bus has no figures either.
    """
    if not (SHARES_HOST_MEMORY.search(device.name) or APPLE.search(device.name)):
        return device
    total = None if host is None else host.total_bytes
    free = None if host is None else host.available_bytes
    if device.vendor == "apple" and device.free_bytes is not None:
        # Apple's figures are those of the pool itself, less what nobody can have.
        total = device.total_bytes if total is None else total
        free = device.free_bytes if free is None else min(free, device.free_bytes)
    return replace(
        device,
        kind="unified",
        total_bytes=total,
        used_bytes=None if total is None or free is None else max(0, total - free),
        free_bytes=free,
        reserved_bytes=None,
    )


def host_of(
    page: Page, total: str, available: str, *, source: str, unit: int = 1
) -> HostMemory | None:
    """The machine's own memory; None if the page does not tell its size."""
    size = size_of(page.value(total), unit)
    if not size:
        return None
    left = size_of(page.value(available), unit)
    return HostMemory(
        total_bytes=size,
        available_bytes=None if left is None else min(left, size),
        source=source,
    )


def vendor_of(text: str) -> str:
    """Who made it, from its name or its maker's; empty if that does not tell."""
    lowered = text.lower()
    for vendor in ("nvidia", "amd", "apple", "intel"):
        if vendor in lowered:
            return vendor
    return "amd" if re.search(r"\b(radeon|advanced micro devices)", lowered) else ""


def nvidia_key(uuid: str) -> str:
    """An NVIDIA device's UUID as its driver writes it; some exporters leave its prefix out."""
    return uuid if re.match(r"(GPU|MIG)-", uuid, re.IGNORECASE) or not uuid else f"GPU-{uuid}"


def program_of(path: str) -> str:
    """A program's name, of a path that may be Windows' and may have arguments."""
    return re.split(r"[/\\]", path.strip())[-1].partition(" ")[0]


def owner_of(name: str) -> Literal["ollama", "other"]:
    """Whether a program is Ollama's."""
    return "ollama" if name.lower().startswith(OLLAMAS_PROGRAMS) else "other"


def processes_by(
    page: Page,
    metric: str,
    key: Callable[[Labels], str | None],
    process: Callable[[Labels, int | None], DeviceProcess | None],
    *,
    unit: int = 1,
) -> dict[str, tuple[DeviceProcess, ...]] | None:
    """Who holds each device's memory; None where the page tells of nobody."""
    rows = page.rows(metric)
    found: dict[str, tuple[DeviceProcess, ...]] = {}
    for row in rows:
        device, holder = key(row.labels), process(row.labels, size_of(row.value, unit))
        if device is not None and holder is not None:
            found[device] = (*found.get(device, ()), holder)
    return found if rows else None


def pid_of(labels: Labels) -> int | None:
    """The process id; None if it is none."""
    pid = labels.get("pid", "")
    return int(pid) if pid.isascii() and pid.isdigit() and len(pid) < 12 else None


def without_memory(devices: Iterable[Device]) -> tuple[str, ...]:
    """A reason for each device whose memory the page does not tell."""
    return tuple(
        f"no memory is told of {device.name or device.key}"
        for device in devices
        if device.total_bytes is None
    )
