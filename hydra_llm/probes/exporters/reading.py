"""Which exporter a page is of, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hydra_llm.probes.exporters import agent, allsmi, amd, intel, nvidia
from hydra_llm.probes.exporters.figures import Found
from hydra_llm.probes.exporters.page import MissingParserError, Page
from hydra_llm.types import Device, HostMemory

__all__ = ["FAMILIES", "ExporterReading", "Family", "read_page"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterReading:
    """What one page told; nothing of it is dated yet."""

    devices: tuple[Device, ...] = ()
    host: HostMemory | None = None
    exporter: str = ""
    """Its name; empty if it was not recognised."""
    refresh_seconds: float = 0.0
    """How old its figures may be, as it reads them only this often."""
    sampled_at: float | None = None
    """When it read them, in Unix time by its own clock; None where it does not tell."""
    reasons: tuple[str, ...] = ()
    """Why there is less than one might expect."""

    @property
    def has_memory(self) -> bool:
        """Whether it tells the memory of any GPU."""
        return any(device.total_bytes is not None for device in self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of exporter."""

    name: str
    read: Callable[[Page], Found]
    metrics: tuple[str, ...] = ()
    """Names it is known by and read from."""
    endings: tuple[str, ...] = ()
    """Of such names, where what goes before them may be anything."""
    refresh_seconds: float = 0.0
    """Between two looks at the GPUs; 0: it looks when it is asked."""

    def metrics_on(self, page: Page) -> list[str]:
        """Names of its metrics that are on a page."""
        return [name for name in page.found if name in self.metrics or name.endswith(self.endings)]


FAMILIES = (
    Family(name=agent.AGENT, metrics=agent.AGENT_METRICS, read=agent.read_agent),
    Family(name=nvidia.NVIDIA_SMI, metrics=nvidia.NVIDIA_SMI_METRICS, read=nvidia.read_nvidia_smi),
    Family(
        name=nvidia.DCGM,
        metrics=nvidia.DCGM_METRICS,
        read=nvidia.read_dcgm,
        refresh_seconds=30.0,
    ),
    Family(
        name=nvidia.NVITOP,
        metrics=nvidia.NVITOP_METRICS,
        read=nvidia.read_nvitop,
        refresh_seconds=1.0,
    ),
    Family(
        name=allsmi.ALL_SMI,
        metrics=allsmi.ALL_SMI_METRICS,
        read=allsmi.read_all_smi,
        refresh_seconds=3.0,
    ),
    Family(
        name=amd.DEVICE_METRICS,
        endings=amd.DEVICE_METRICS_ENDINGS,
        read=amd.read_device_metrics,
    ),
    Family(name=intel.XPUMD, metrics=intel.XPUMD_METRICS, read=intel.read_xpumd),
    Family(name=intel.XPUM, metrics=intel.XPUM_METRICS, read=intel.read_xpum),
    Family(name=amd.NODE, metrics=amd.NODE_METRICS, read=amd.read_node),
    Family(name=amd.AMD_SMI, metrics=amd.AMD_SMI_METRICS, read=amd.read_amd_smi),
)
"""Best first: of two on one page, the first that tells any GPU's memory counts."""


def read_page(text: str, families: Iterable[Family] = FAMILIES) -> ExporterReading:
    """
    What a page tells; whatever is wrong with it is a reason.

    It needs ``prometheus_client``, and says so without.
    """
    families = tuple(families)
    try:
        page = Page(
            text,
            frozenset(name for family in families for name in family.metrics),
            tuple(ending for family in families for ending in family.endings),
        )
    except MissingParserError:
        why = "prometheus_client is not installed; pip install 'hydra-llm[gpu]'"
        return ExporterReading(reasons=(why,))
    readings = [
        _reading(page, family, names) for family in families if (names := family.metrics_on(page))
    ]
    if not readings:
        return ExporterReading(reasons=(_why_unknown(text), *_losses(page)))
    best = next((one for one in readings if one.has_memory), readings[0])
    host = next((one.host for one in readings if one.host is not None), None)
    return ExporterReading(
        devices=best.devices,
        host=best.host or host,
        exporter=best.exporter,
        refresh_seconds=best.refresh_seconds,
        sampled_at=best.sampled_at,
        reasons=(*best.reasons, *_losses(page)),
    )


def _reading(page: Page, family: Family, names: list[str]) -> ExporterReading:
    machines = page.machines(names)
    if machines > 1:
        why = f"it is of {machines} machines; name the node's own exporter"
        return ExporterReading(exporter=family.name, reasons=(why,))
    found = family.read(page)
    return ExporterReading(
        devices=found.devices,
        host=found.host,
        exporter=family.name,
        refresh_seconds=family.refresh_seconds,
        sampled_at=found.sampled_at,
        reasons=found.reasons,
    )


def _why_unknown(text: str) -> str:
    if text.lstrip()[:1] == "<":
        return "it is a web page; metrics are as a rule at /metrics"
    return "it is of no exporter that is known here, or tells nothing of GPUs"


def _losses(page: Page) -> Iterable[str]:
    if page.bad_lines:
        yield f"{page.bad_lines} of its lines cannot be read"
    if page.is_cut:
        yield "it is too long to be read to its end"
