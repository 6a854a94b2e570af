"""all-smi in its ``api`` mode: NVIDIA, AMD, Apple, Jetson. Source: its ``API.md``."""

from __future__ import annotations

from hydra_llm.probes.exporters.figures import (
    Figures,
    Found,
    Labels,
    device_of,
    gathered,
    host_of,
    nvidia_key,
    on_host_memory,
    vendor_of,
    without_memory,
)
from hydra_llm.probes.exporters.page import Page
from hydra_llm.types import Device, HostMemory

ALL_SMI = "all-smi"
_MEMORY = {one: f"all_smi_gpu_memory_{one}_bytes" for one in ("total", "used")}
_BUSY = "all_smi_gpu_utilization"
_INFO = "all_smi_gpu_info"
_HOST = ("all_smi_memory_total_bytes", "all_smi_memory_available_bytes")
_UP = "all_smi_up"
ALL_SMI_METRICS = (*_MEMORY.values(), _BUSY, _INFO, *_HOST, _UP)


def read_all_smi(page: Page) -> Found:
    """Devices, once it has looked at them: until then it says that it is not up."""
    if page.value(_UP) == 0:
        return Found(reasons=("it has not read the GPUs yet",))
    host = host_of(page, *_HOST, source=ALL_SMI)
    found = gathered(page, {**_MEMORY, "busy": _BUSY, "info": _INFO}, _key)
    # NPUs stand in the same rows.
    gpus = [one for one in found.values() if one.labels.get("type", "GPU").upper() == "GPU"]
    devices = tuple(_device(figures, host) for figures in gpus)
    return Found(devices, host, reasons=without_memory(devices))


def _key(labels: Labels) -> str | None:
    return labels.get("gpu_uuid") or labels.get("gpu_index")


def _device(figures: Figures, host: HostMemory | None) -> Device:
    name, key = figures.labels.get("gpu", ""), _key(figures.labels) or ""
    vendor = vendor_of(f"{name} {figures.labels.get('architecture', '')}")
    if not vendor and key.startswith("GPU-"):
        vendor = "nvidia"
    busy = figures.values.get("busy")
    device = device_of(
        figures,
        key=nvidia_key(key) if vendor == "nvidia" else key,
        vendor=vendor,
        source=ALL_SMI,
        name=name,
        busy=None if busy is None else busy / 100,
    )
    return on_host_memory(device, host)
