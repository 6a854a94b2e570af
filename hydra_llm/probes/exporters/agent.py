"""``hydra-llm agent``, which says of each figure what the others leave out."""

from __future__ import annotations

from typing import Literal

from hydra_llm.probes.exporters.figures import (
    Figures,
    Found,
    Labels,
    device_of,
    gathered,
    host_of,
    nvidia_key,
    pid_of,
    processes_by,
    without_memory,
)
from hydra_llm.probes.exporters.page import Page
from hydra_llm.types import Device, DeviceProcess

AGENT = "hydra-agent"
_MEMORY = {
    one: f"hydra_node_gpu_memory_{one}_bytes" for one in ("total", "used", "free", "reserved")
}
_BUSY = "hydra_node_gpu_utilization_ratio"
_PROCESSES = "hydra_node_gpu_process_memory_bytes"
_HOST = ("hydra_node_host_memory_total_bytes", "hydra_node_host_memory_available_bytes")
_SAMPLED = "hydra_node_sample_timestamp_seconds"
_INFO = "hydra_node_agent_info"
AGENT_METRICS = (*_MEMORY.values(), _BUSY, _PROCESSES, *_HOST, _SAMPLED, _INFO)


def read_agent(page: Page) -> Found:
    """Devices, who holds them, the host, and when all this was read."""
    found = gathered(page, {**_MEMORY, "busy": _BUSY}, _key)
    holders = processes_by(page, _PROCESSES, _key, _process)
    devices = tuple(_device(key, figures, holders) for key, figures in found.items())
    sampled_at = page.value(_SAMPLED)
    told = [row.labels.get("reasons", "") for row in page.rows(_INFO)]
    return Found(
        devices,
        host_of(page, *_HOST, source=AGENT),
        # NaN is no time.
        sampled_at if sampled_at is not None and 0 < sampled_at < 1e11 else None,
        (*without_memory(devices), *(one for one in told if one)),
    )


def _key(labels: Labels) -> str | None:
    return labels.get("uuid") or labels.get("gpu")


def _device(
    key: str, figures: Figures, holders: dict[str, tuple[DeviceProcess, ...]] | None
) -> Device:
    labels = figures.labels
    vendor = labels.get("vendor", "")
    kind: Literal["discrete", "mig", "unified"] = "discrete"
    if labels.get("kind") == "mig":
        kind = "mig"
    elif labels.get("kind") == "unified":
        kind = "unified"
    is_gpu_uuid = vendor == "nvidia" and kind != "mig" and bool(labels.get("uuid"))
    return device_of(
        figures,
        key=nvidia_key(key) if is_gpu_uuid else key,
        vendor=vendor,
        source=AGENT,
        kind=kind,
        name=labels.get("name", ""),
        busy=figures.values.get("busy"),
        processes=None if holders is None else holders.get(key, ()),
    )


def _process(labels: Labels, used: int | None) -> DeviceProcess | None:
    pid = pid_of(labels)
    if pid is None:
        return None
    return DeviceProcess(
        pid=pid,
        name=labels.get("comm", ""),
        owner="ollama" if labels.get("owner") == "ollama" else "other",
        used_bytes=used,
    )
