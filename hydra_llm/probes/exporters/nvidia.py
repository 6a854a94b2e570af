"""Exporters of NVIDIA's GPUs: dcgm-exporter, nvidia_gpu_exporter and nvitop-exporter.

Sources: dcgm-exporter's ``etc/default-counters.csv`` and ``internal/pkg/rendermetrics``,
nvidia_gpu_exporter's ``docs/METRICS.md``, ``nvitop_exporter/exporter.py``.
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
    nvidia_key,
    on_host_memory,
    owner_of,
    pid_of,
    processes_by,
    program_of,
    without_memory,
)
from hydra_llm.probes.exporters.page import Page
from hydra_llm.types import Device, DeviceProcess

DCGM = "dcgm-exporter"
DCGM_METRICS = tuple(
    f"DCGM_FI_DEV_{name}" for name in ("FB_FREE", "FB_USED", "FB_RESERVED", "GPU_UTIL")
)


def read_dcgm(page: Page) -> Found:
    """
    Devices from the frame buffer's fields, in MiB; it tells no total.

    Before 2025-08 the reserved part is not among its fields, and the sum is too small by it.
    """
    free, used, reserved, busy = DCGM_METRICS
    names = {"free": free, "used": used, "reserved": reserved, "busy": busy}
    found = gathered(page, names, _dcgm_key)
    cut = {key.partition("/")[0] for key in found if "/" in key}
    devices = tuple(
        _dcgm_device(key, figures)
        # The sum over a GPU's instances is nobody's to use.
        for key, figures in found.items()
        if key not in cut
    )
    return Found(devices, reasons=without_memory(devices))


def _dcgm_key(labels: Labels) -> str | None:
    uuid = nvidia_key(labels.get("uuid", "")) or labels.get("gpu")
    instance = labels.get("gpu_i_id")
    return f"{uuid}/{instance}" if uuid and instance else uuid


def _dcgm_device(key: str, figures: Figures) -> Device:
    name = figures.labels.get("modelname", "")
    is_instance = "/" in key
    busy = figures.values.get("busy")
    device = device_of(
        figures,
        key=key,
        vendor="nvidia",
        source=DCGM,
        unit=MIB,
        kind="mig" if is_instance else "discrete",
        name=name,
        busy=None if busy is None else busy / 100,
    )
    return device if is_instance else on_host_memory(device, None)


# ------------------------------------------------------------ utkuozdemir's exporter

NVIDIA_SMI = "nvidia_gpu_exporter"
_FIGURES = ("total", "used", "free", "reserved")
_MEMORY = {one: f"nvidia_smi_memory_{one}_bytes" for one in _FIGURES}
_MIG_MEMORY = {one: f"nvidia_smi_mig_memory_{one}_bytes" for one in _FIGURES}
_PROCESSES = "nvidia_smi_compute_app_used_memory_bytes"
_BUSY = "nvidia_smi_utilization_gpu_ratio"
_INFO = "nvidia_smi_gpu_info"
_MIG_MODE = "nvidia_smi_mig_mode_current"
_COLLECTED = "nvidia_smi_last_collect_success"
NVIDIA_SMI_METRICS = (
    *_MEMORY.values(),
    *_MIG_MEMORY.values(),
    *(_PROCESSES, _BUSY, _INFO, _MIG_MODE, _COLLECTED),
)


def read_nvidia_smi(page: Page) -> Found:
    """Devices from what ``nvidia-smi`` said at the scrape, on Windows too."""
    if page.value(_COLLECTED) == 0:
        return Found(reasons=("its last nvidia-smi failed",))
    cut = {
        key
        for key, one in gathered(page, {"cut": _MIG_MODE}, _uuid_key).items()
        if one.values["cut"] == 1
    }
    whole = gathered(page, {**_MEMORY, "busy": _BUSY, "info": _INFO}, _uuid_key)
    holders = processes_by(page, _PROCESSES, _instance_or_uuid, _nvidia_smi_process)
    instances = gathered(page, _MIG_MEMORY, _instance_key)
    cut |= {key.partition("/")[0] for key in instances}
    devices: list[Device] = []
    for key, figures in whole.items():
        if key not in cut:
            devices.append(on_host_memory(_nvidia_smi_device(key, figures, holders), None))
    for key, figures in instances.items():
        parent = whole.get(key.partition("/")[0], Figures())
        figures.labels = {**parent.labels, **figures.labels}
        devices.append(_nvidia_smi_device(key, figures, holders, is_instance=True))
    bare = sorted(cut - {key.partition("/")[0] for key in instances})
    reasons = tuple(f"no memory is told of the MIG instances of {key}" for key in bare)
    return Found(tuple(devices), reasons=without_memory(devices) + reasons)


def _nvidia_smi_device(
    key: str,
    figures: Figures,
    holders: dict[str, tuple[DeviceProcess, ...]] | None,
    *,
    is_instance: bool = False,
) -> Device:
    return device_of(
        figures,
        key=key,
        vendor="nvidia",
        source=NVIDIA_SMI,
        kind="mig" if is_instance else "discrete",
        name=figures.labels.get("name", ""),
        busy=figures.values.get("busy"),
        processes=None if holders is None else holders.get(key, ()),
    )


def _uuid_key(labels: Labels) -> str | None:
    return nvidia_key(labels.get("uuid", "")) or None


def _instance_key(labels: Labels) -> str | None:
    uuid, instance = _uuid_key(labels), labels.get("gpu_instance_id")
    return f"{uuid}/{instance}" if uuid and instance else None


def _instance_or_uuid(labels: Labels) -> str | None:
    return _instance_key(labels) or _uuid_key(labels)


def _nvidia_smi_process(labels: Labels, used: int | None) -> DeviceProcess | None:
    pid = pid_of(labels)
    if pid is None:
        return None
    name = program_of(labels.get("process_name", ""))
    return DeviceProcess(pid=pid, name=name, owner=owner_of(name), used_bytes=used)


# ------------------------------------------------------------------- nvitop-exporter

NVITOP = "nvitop-exporter"
_NVITOP_MEMORY = {one: f"gpu_memory_{one}_MiB" for one in ("total", "used", "free")}
_NVITOP_BUSY = "gpu_utilization_Percentage"
_NVITOP_PROCESSES = "process_gpu_memory_MiB"
_NVITOP_HOST = ("host_virtual_memory_total_MiB", "host_virtual_memory_free_MiB")
NVITOP_METRICS = (*_NVITOP_MEMORY.values(), _NVITOP_BUSY, _NVITOP_PROCESSES, *_NVITOP_HOST)


def read_nvitop(page: Page) -> Found:
    """Devices in MiB, NaN where a chip has no memory of its own; the host's memory too."""
    host = host_of(page, *_NVITOP_HOST, source=NVITOP, unit=MIB)
    found = gathered(page, {**_NVITOP_MEMORY, "busy": _NVITOP_BUSY}, _nvitop_key)
    holders = processes_by(page, _NVITOP_PROCESSES, _nvitop_key, _nvitop_process, unit=MIB)
    # A MIG instance's index is its GPU's, a colon, and its own.
    indices = {figures.labels.get("index", "") for figures in found.values()}
    cut = {index.partition(":")[0] for index in indices if ":" in index}
    devices = []
    for key, figures in found.items():
        index = figures.labels.get("index", "")
        if index in cut:
            continue
        busy = figures.values.get("busy")
        device = device_of(
            figures,
            key=key,
            vendor="nvidia",
            source=NVITOP,
            unit=MIB,
            kind="mig" if ":" in index or key.upper().startswith("MIG-") else "discrete",
            name=figures.labels.get("devicename", ""),
            busy=None if busy is None else busy / 100,
            processes=None if holders is None else holders.get(key, ()),
        )
        devices.append(device if device.kind == "mig" else on_host_memory(device, host))
    return Found(tuple(devices), host, reasons=without_memory(devices))


def _nvitop_key(labels: Labels) -> str | None:
    return _uuid_key(labels) or labels.get("index")


def _nvitop_process(labels: Labels, used: int | None) -> DeviceProcess | None:
    pid = pid_of(labels)
    if pid is None:
        return None
    # It tells no program, but whose it is: the service has a user of its own.
    return DeviceProcess(pid=pid, owner=owner_of(labels.get("username", "")), used_bytes=used)
