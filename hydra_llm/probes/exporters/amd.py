"""Exporters of AMD's GPUs: device-metrics-exporter and node_exporter, which also has the host.

Sources: device-metrics-exporter's ``docs/configuration/metricslist.md`` and
``pkg/amdgpu/gpuagent``, node_exporter's ``collector/drm_linux.go`` and ``meminfo.go``.
"""

from __future__ import annotations

from hydra_llm.probes.exporters.figures import (
    MIB,
    Figures,
    Found,
    Labels,
    device_of,
    gathered,
    host_of,
    without_memory,
)
from hydra_llm.probes.exporters.page import Page
from hydra_llm.types import Device

GIB = 1 << 30

DEVICE_METRICS = "device-metrics-exporter"
_VRAM = ("total", "used", "free")
DEVICE_METRICS_ENDINGS = (*(f"gpu_{one}_vram" for one in _VRAM), "gpu_gfx_activity")
"""Its configuration may put a prefix before every name."""


def read_device_metrics(page: Page) -> Found:
    """Devices of MiB, which it calls MB: 196592 of them on a card of 192 GiB."""
    prefix = next(
        (
            name.removesuffix(ending)
            for name in page.found
            for ending in DEVICE_METRICS_ENDINGS
            if name.endswith(ending)
        ),
        "",
    )
    names = {one: f"{prefix}gpu_{one}_vram" for one in _VRAM}
    found = gathered(page, {**names, "busy": f"{prefix}gpu_gfx_activity"}, _partition)
    devices: list[Device] = []
    seen: set[str] = set()
    for key, figures in sorted(found.items(), key=_partition_number):
        # Partitions of a card in NPS1 all show its one memory.
        shares = figures.labels.get("gpu_memory_partition_type", "").lower() == "nps1"
        if shares and _card(figures.labels) in seen:
            continue
        seen.add(_card(figures.labels))
        devices.append(_device_metrics_device(key, figures))
    return Found(tuple(devices), reasons=without_memory(devices))


def _device_metrics_device(key: str, figures: Figures) -> Device:
    busy = figures.values.get("busy")
    return device_of(
        figures,
        key=key,
        vendor="amd",
        source=DEVICE_METRICS,
        unit=MIB,
        busy=None if busy is None else busy / 100,
    )


def _partition_number(one: tuple[str, Figures]) -> str:
    return one[1].labels.get("gpu_partition_id", "")


def _card(labels: Labels) -> str:
    return labels.get("serial_number") or labels.get("gpu_uuid") or labels.get("gpu_id", "")


def _partition(labels: Labels) -> str | None:
    own = labels.get("gpu_uuid") or labels.get("serial_number") or labels.get("gpu_id")
    part = labels.get("gpu_partition_id", "0")
    return own if not own or part in ("", "0") else f"{own}/{part}"


# ------------------------------------------------------------------ amd_smi_exporter

AMD_SMI = "amd_smi_exporter"
AMD_SMI_METRICS = ("amd_gpu_memory_use_percent",)


def read_amd_smi(page: Page) -> Found:
    """Tell that nothing can be had of it: the percentage is how busy the memory is."""
    return Found(reasons=("it tells how busy memory is, not how full; use another exporter",))


# --------------------------------------------------------------------- node_exporter

NODE = "node_exporter"
_DRM = {
    "total": "node_drm_memory_vram_size_bytes",
    "used": "node_drm_memory_vram_used_bytes",
    "gtt_total": "node_drm_memory_gtt_size_bytes",
    "gtt_used": "node_drm_memory_gtt_used_bytes",
    "busy": "node_drm_gpu_busy_percent",
    "info": "node_drm_card_info",
}
_HOST = ("node_memory_MemTotal_bytes", "node_memory_MemAvailable_bytes")
NODE_METRICS = (*_DRM.values(), *_HOST)


def read_node(page: Page) -> Found:
    """The host's memory, and AMD's cards if it was started with ``--collector.drm``."""
    host = host_of(page, *_HOST, source=NODE)
    found = gathered(page, _DRM, lambda labels: labels.get("card"))
    devices = tuple(_drm_device(card, figures) for card, figures in found.items())
    reasons = without_memory(devices)
    if not devices:
        reasons = ("it tells of no GPU; of AMD's it does with --collector.drm",)
    return Found(devices, host, reasons=reasons)


def _drm_device(card: str, figures: Figures) -> Device:
    is_shared = _uses_host_memory(figures)
    if is_shared:
        for one in ("total", "used"):
            more = figures.values.get(f"gtt_{one}")
            if one in figures.values and more is not None:
                figures.values[one] += more
    busy = figures.values.get("busy")
    return device_of(
        figures,
        key=figures.labels.get("unique_id") or card,
        vendor=figures.labels.get("vendor") or "amd",
        source=NODE,
        kind="unified" if is_shared else "discrete",
        busy=None if busy is None else busy / 100,
    )


def _uses_host_memory(figures: Figures) -> bool:
    """Whether it is a processor's own GPU, by the test that Ollama has for it."""
    vram, gtt = figures.size("total"), figures.size("gtt_total")
    if vram is None or gtt is None:
        return False
    return vram <= 4 * GIB and gtt >= 8 * GIB and gtt >= 4 * vram
