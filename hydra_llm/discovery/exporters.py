"""Metrics exporters beside a server: on the ports they usually have."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_llm.discovery.answers import plain
from hydra_llm.discovery.calling import Caller, NoAnswerError, Reply, url_host
from hydra_llm.networks import Address
from hydra_llm.probes.exporters import ExporterReading, read_page

__all__ = ["AGENT_PORT", "EXPORTER_PORTS", "Beside", "FoundExporter", "exporters_beside"]

PAGE_BYTES = 4 << 20

AGENT_PORT = 9936

EXPORTER_PORTS = (
    AGENT_PORT,  # hydra-llm agent
    9835,  # nvidia_gpu_exporter
    9400,  # NVIDIA's dcgm-exporter
    8000,  # nvitop-exporter
    9090,  # all-smi; Prometheus itself as well
    5000,  # AMD's device-metrics-exporter
    9966,  # Intel's xpumd
    9100,  # node_exporter: the GPUs of AMD, with --collector.drm
)
"""Best first, as in :data:`hydra_llm.probes.exporters.reading.FAMILIES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundExporter:
    """A page that tells the memory of GPUs."""

    url: str
    name: str
    """What kind it is, as ``dcgm-exporter``."""
    gpus: int
    total_bytes: int
    """Of all GPUs whose memory it tells."""
    uuids: frozenset[str]
    """Of its GPUs, as far as their maker gave them one: each is another in the world."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What there is on the ports of exporters, at one address."""

    exporter: FoundExporter | None = None
    locked: tuple[str, ...] = ()
    """URLs that want a login: an agent, as a rule."""


async def exporters_beside(
    caller: Caller, address: Address, ports: Sequence[int] = EXPORTER_PORTS
) -> Beside:
    """The first exporter that tells any GPU's memory, in the order of the ports."""
    replies = await asyncio.gather(*(_page(caller, address, port) for port in ports))
    locked = []
    for port, reply in zip(ports, replies, strict=True):
        url = f"http://{url_host(address, port)}/metrics"
        if reply is not None and reply.status in (401, 403):
            locked.append(url)
        if reply is None or reply.status != 200:
            continue
        text = reply.body.decode(errors="replace")
        try:
            # In a thread: a page that means harm takes half a second.
            reading = await asyncio.get_running_loop().run_in_executor(None, read_page, text)
        except Exception:  # noqa: S112  # a fault of ours over one page must not end the search
            continue
        if reading.has_memory:
            return Beside(exporter=_found(url, reading), locked=tuple(locked))
    return Beside(locked=tuple(locked))


async def _page(caller: Caller, address: Address, port: int) -> Reply | None:
    try:
        return await caller.get(address, port, "/metrics", most_bytes=PAGE_BYTES)
    except NoAnswerError:
        return None


def _found(url: str, reading: ExporterReading) -> FoundExporter:
    sizes = [one.total_bytes for one in reading.devices if one.total_bytes is not None]
    keys = [_UUID.search(device.key.lower()) for device in reading.devices]
    return FoundExporter(
        url=url,
        name=plain(reading.exporter),
        gpus=len(sizes),
        total_bytes=sum(sizes),
        uuids=frozenset(key[0] for key in keys if key is not None),
    )


# Other keys, as a slot on the bus or a number, are alike on many machines.
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
