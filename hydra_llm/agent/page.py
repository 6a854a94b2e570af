"""What the agent tells, in Prometheus' text format 0.0.4."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hydra_llm.probes.local import LocalReading
from hydra_llm.types import Device

__all__ = ["CONTENT_TYPE", "FAMILIES", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FAMILIES = {
    "hydra_node_gpu_memory_total_bytes": "Device memory.",
    "hydra_node_gpu_memory_used_bytes": "Device memory in use, without reserved.",
    "hydra_node_gpu_memory_free_bytes": "Device memory that can be allocated.",
    "hydra_node_gpu_memory_reserved_bytes": "Device memory held by driver and firmware.",
    "hydra_node_gpu_utilization_ratio": "Busy share, 0..1.",
    "hydra_node_gpu_process_memory_bytes": (
        "Device memory of one process; absent where the driver does not tell."
    ),
    "hydra_node_host_memory_total_bytes": "RAM (or cgroup limit).",
    "hydra_node_host_memory_available_bytes": "RAM that can be taken without swapping.",
    "hydra_node_sample_timestamp_seconds": "When the devices were read (this node's clock).",
    "hydra_node_agent_info": "Agent version and what it could not read.",
}
"""Every family, all of them gauges, with what it means; one without a value is left out."""


class _Sample(NamedTuple):
    family: str
    value: float | None
    labels: Mapping[str, str] = {}


def render(reading: LocalReading, *, sampled_at: float, version: str) -> str:
    """
    The page for one reading. What is unknown is not in it.

    Args:
        reading: what was read.
        sampled_at: when that was, in seconds since 1970.
        version: the agent's.
    """
    samples = [
        sample for sample in _samples(reading, sampled_at, version) if sample.value is not None
    ]
    return "".join(
        f"# HELP {family} {meaning}\n# TYPE {family} gauge\n{''.join(lines)}"
        for family, meaning in FAMILIES.items()
        if (lines := [_line(sample) for sample in samples if sample.family == family])
    )


def _samples(reading: LocalReading, sampled_at: float, version: str) -> Iterator[_Sample]:
    for index, device in enumerate(reading.devices or ()):
        yield from _of_device(str(index), device)
    if reading.host is not None:
        yield _Sample("hydra_node_host_memory_total_bytes", reading.host.total_bytes)
        yield _Sample("hydra_node_host_memory_available_bytes", reading.host.available_bytes)
    yield _Sample("hydra_node_sample_timestamp_seconds", sampled_at)
    about = {"reasons": "; ".join(reading.reasons), "version": version}
    yield _Sample("hydra_node_agent_info", 1, about)


def _of_device(gpu: str, device: Device) -> Iterator[_Sample]:
    # Of shared memory others use a part too, which is no use of this device.
    used = None if device.kind == "unified" else device.used_bytes
    uuid = device.key.removeprefix("GPU-")
    about = {
        "gpu": gpu,
        "kind": device.kind,
        "name": device.name,
        "uuid": uuid,
        "vendor": device.vendor,
    }
    yield _Sample("hydra_node_gpu_memory_total_bytes", device.total_bytes, about)
    yield _Sample("hydra_node_gpu_memory_used_bytes", used, about)
    yield _Sample("hydra_node_gpu_memory_free_bytes", device.free_bytes, about)
    yield _Sample("hydra_node_gpu_memory_reserved_bytes", device.reserved_bytes, about)
    yield _Sample("hydra_node_gpu_utilization_ratio", device.utilization, about)
    for process in device.processes or ():
        held_by = {
            "comm": process.name,
            "gpu": gpu,
            "owner": process.owner,
            "pid": str(process.pid),
            "uuid": uuid,
        }
        yield _Sample("hydra_node_gpu_process_memory_bytes", process.used_bytes, held_by)


def _line(sample: _Sample) -> str:
    return f"{sample.family}{_in_braces(sample.labels.items())} {sample.value!r}\n"


def _in_braces(labels: Iterable[tuple[str, str]]) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{pairs}}}" if pairs else ""


_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n"}
_ENDS_OF_LINES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What a reader may take for the end of a line, and what is no text."""


def _escaped(value: str) -> str:
    """A label's value: anybody on this machine can call a program what they like."""
    plain = _ENDS_OF_LINES.sub("\ufffd", value)
    return re.sub(r'[\\"\n]', lambda found: _ESCAPES[found[0]], plain)
