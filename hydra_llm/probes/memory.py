"""GPU memory of a node, from the best of the sources that know it.

What a source can see comes in as :class:`Evidence`; each source is a function that makes
figures of it or has nothing to say. A better source is one more function in :data:`SOURCES`,
which names them best first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hydra_llm.types import GB, Device, LoadedModel, Node
from hydra_llm.vram.estimator import CONTEXT_BYTES

__all__ = ["SOURCES", "Evidence", "MemorySource", "VramFigures", "vram_figures"]

SHARES_HOST_MEMORY = re.compile(r"\b(GB10|N1X?|Tegra|Jetson|Orin|Thor|Xavier)\b", re.IGNORECASE)
"""Chips whose GPU has no memory of its own; some report a small pool that is not the limit."""

GPU_OVERHEAD_BYTES = CONTEXT_BYTES
"""CUDA context and the like, per loaded model, which ``/api/ps`` does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What there is to judge one node's GPU memory by."""

    node: Node
    exported: tuple[Device, ...] = ()
    """As its exporter tells them."""
    exporter_trouble: str = ""
    """Why its exporter tells nothing, or nothing new."""
    devices: tuple[Device, ...] = ()
    """As measured by ourselves, on this machine."""
    loaded: Mapping[str, LoadedModel] | None = None
    """As ``/api/ps`` showed it; None if it never did."""
    loaded_at: float | None = None
    most_loaded_bytes: int = 0
    """The most GPU memory its models were ever seen to hold."""


class VramFigures(NamedTuple):
    """GPU memory of one node; None is unknown."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    source: str | None = None
    observed_at: float | None = None


UNKNOWN = VramFigures()


class MemorySource(Protocol):
    """One way to know a node's GPU memory; None when it cannot tell."""

    def __call__(self, evidence: Evidence, /) -> VramFigures | None:
        """Make figures of the evidence."""
        ...


def exported(evidence: Evidence) -> VramFigures | None:
    """What an exporter on the node tells: the only one that sees all of another machine's use."""
    return _sum_of(evidence.exported)


def measured(evidence: Evidence) -> VramFigures | None:
    """What this machine's driver tells."""
    return _sum_of(evidence.devices)


def _sum_of(devices: Iterable[Device]) -> VramFigures | None:
    """The sum of the devices that answer; a lost GPU gives no place to anything."""
    known = [device for device in devices if device.total_bytes is not None]
    if not known:
        return None
    return VramFigures(
        total_bytes=_sum(known, lambda device: device.total_bytes),
        free_bytes=_sum(known, lambda device: device.free_bytes),
        source=" + ".join(sorted({device.source for device in known})) or None,
        observed_at=min(
            (device.observed_at for device in known if device.observed_at is not None),
            default=None,
        ),
    )


def _sum(devices: Sequence[Device], figure: Callable[[Device], int | None]) -> int | None:
    """Separate memories add up; a pool that several devices share counts once."""
    own = [n for one in devices if one.kind != "unified" and (n := figure(one)) is not None]
    pool = [n for one in devices if one.kind == "unified" and (n := figure(one)) is not None]
    return sum(own) + max(pool, default=0) if own or pool else None


def configured(evidence: Evidence) -> VramFigures | None:
    """``vram_gb``, less what is reserved and what ``/api/ps`` shows: blind to all else."""
    if evidence.node.vram_gb is None:
        return None
    total = int(evidence.node.vram_gb * GB)
    if total == 0:
        return VramFigures(0, 0, "config", evidence.loaded_at)
    if evidence.loaded is None:
        return VramFigures(total, None, "config", None)
    reserved = int(evidence.node.vram_reserved_gb * GB)
    free = max(0, total - reserved - bytes_held(evidence.loaded.values()))
    return VramFigures(total, free, "config - /api/ps", evidence.loaded_at)


def at_least(evidence: Evidence) -> VramFigures | None:
    """
    What its models were seen to hold, as a remark only.

    It is there for certain, but a bound is no total: both figures stay unknown.
    """
    if not evidence.most_loaded_bytes:
        return None
    remark = f"/api/ps: at least {evidence.most_loaded_bytes / GB:.1f} GB"
    return VramFigures(None, None, remark, evidence.loaded_at)


SOURCES: tuple[MemorySource, ...] = (exported, measured, configured, at_least)


def vram_figures(evidence: Evidence, sources: Iterable[MemorySource] = SOURCES) -> VramFigures:
    """
    The figures of the first source that has any.

    A configured ``vram_gb`` caps what is measured: it may leave room for other programs on
    purpose. An exporter that was named and is of no use is named with its trouble.
    """
    figures = _first(evidence, sources)
    if not evidence.exporter_trouble:
        return figures
    trouble = f"exporter: {evidence.exporter_trouble}"
    return figures._replace(source=f"{figures.source} ({trouble})" if figures.source else trouble)


def _first(evidence: Evidence, sources: Iterable[MemorySource]) -> VramFigures:
    for source in sources:
        figures = source(evidence)
        if figures is not None:
            cap = configured(evidence)
            return figures if cap is None or source is configured else _capped(figures, cap)
    return UNKNOWN


def _capped(figures: VramFigures, cap: VramFigures) -> VramFigures:
    total = _least(figures.total_bytes, cap.total_bytes)
    free = _least(figures.free_bytes, cap.free_bytes)
    if (total, free) == figures[:2]:
        return figures
    return figures._replace(
        total_bytes=total, free_bytes=free, source=f"{figures.source}, capped by config"
    )


def _least(*figures: int | None) -> int | None:
    return min((one for one in figures if one is not None), default=None)


def bytes_held(loaded: Iterable[LoadedModel]) -> int:
    """GPU memory that loaded models hold, as far as ``/api/ps`` shows it."""
    return sum(
        model.size_vram_bytes + GPU_OVERHEAD_BYTES for model in loaded if model.size_vram_bytes
    )
