"""Exporters of Intel's GPUs: xpumanager 1.x and xpumd 2.x, whose names are OpenTelemetry's."""

from __future__ import annotations

from hydra_llm.probes.exporters.figures import (
    Found,
    Labels,
    device_of,
    gathered,
    vendor_of,
    without_memory,
)
from hydra_llm.probes.exporters.page import Page

XPUM = "xpumanager"
_XPUM = {"used": "xpum_memory_used_bytes", "percent": "xpum_memory_ratio"}
XPUM_METRICS = tuple(_XPUM.values())

LEAST_PERCENT = 5.0
"""It is told to a tenth of a percent: of less than this, the total is a guess."""


def read_xpum(page: Page) -> Found:
    """Devices whose total is only to be had from the share that is used: to about 1 %."""
    devices = []
    for key, figures in gathered(page, _XPUM, lambda labels: labels.get("uuid")).items():
        percent, used = figures.values.get("percent"), figures.size("used")
        if used is not None and percent is not None and LEAST_PERCENT <= percent <= 100:
            figures.values["total"] = used / percent * 100
        labels = figures.labels
        devices.append(
            device_of(
                figures, key=key, vendor="intel", source=XPUM, name=labels.get("dev_name", "")
            )
        )
    reasons = without_memory(devices)
    if reasons:
        reasons = (*reasons, "it tells no total; set vram_gb")
    return Found(tuple(devices), reasons=reasons)


XPUMD = "xpumd"
_XPUMD = {"total": "hw_memory_size_bytes", "used": "hw_memory_usage_bytes"}
_XPUMD_INFO = "hw_gpu_info"
XPUMD_METRICS = (*_XPUMD.values(), _XPUMD_INFO)


def read_xpumd(page: Page) -> Found:
    """Devices with their own memory; what they use of the host's is left out."""
    infos = gathered(page, {"info": _XPUMD_INFO}, lambda labels: labels.get("hw_id"))
    devices = []
    for key, figures in gathered(page, _XPUMD, _of_the_device, adds_up=True).items():
        about = infos[key].labels if key in infos else {}
        device = device_of(
            figures,
            key=about.get("pci_bdf") or key,
            vendor=vendor_of(about.get("hw_vendor", "")) or "intel",
            source=XPUMD,
            name=figures.labels.get("hw_name", ""),
        )
        devices.append(device)
    return Found(tuple(devices), reasons=without_memory(devices))


def _of_the_device(labels: Labels) -> str | None:
    location = labels.get("hw_memory_location", "device")
    return labels.get("hw_id") if location == "device" else None
