"""What is known of the nodes, as plain data and as something to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_llm.tables import html_table, stacked_bars, text_table
from hydra_llm.types import GB, Device, NodeSnapshot

__all__ = ["ModelFits", "NodeResources", "fit_cells", "resources_of"]

_HEAD = ("node", "health", "VRAM free", "VRAM source", "loaded models", "in flight")


class NodeResources(list[dict[str, Any]]):
    """
    A dictionary a node, in the order of the configuration; a table where one looks at it.

    It is a list in every other respect: ``json.dumps`` takes it.
    """

    def _rows(self) -> list[list[str]]:
        return [
            [
                node["id"],
                _health(node),
                _vram(node),
                _source(node),
                "\n".join(f"{m['name']} {_gb_text(m['vram_gb'])}" for m in node["loaded_models"]),
                str(node["in_flight"]),
            ]
            for node in self
        ]

    def _repr_html_(self) -> str:
        """For notebooks: GPU memory as bars where it is known, and everything as a table."""
        bars = [(node["id"], _memory(node)) for node in self if node["vram_total_gb"]]
        return stacked_bars(bars, unit="GB", rest="free") + html_table(_HEAD, self._rows())

    def __repr__(self) -> str:
        rows = [[cell.replace("\n", ", ") for cell in row] for row in self._rows()]
        return text_table(_HEAD, rows)


class ModelFits(list[dict[str, Any]]):
    """Where a model could run: a dictionary a node, and a table where one looks at it."""

    def _rows(self) -> list[list[str]]:
        return [fit_cells(node) for node in self]

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html_table(_FIT_HEAD, self._rows())

    def __repr__(self) -> str:
        return text_table(_FIT_HEAD, self._rows())


_FIT_HEAD = ("node", "place", "needs", "free", "context", "longest context", "tokens/s")


def fit_cells(node: Mapping[str, Any]) -> list[str]:
    """A row of a table of what :meth:`hydra_llm.Router.fit` says of one node."""
    pace = node.get("tokens_per_second")
    return [
        node["node"],
        _place(node),
        _need(node),
        _gb_text(node["free_gb"]),
        str(node.get("num_ctx", "")),
        str(node.get("largest_num_ctx") or ""),
        f"{pace:.3g}" if pace else "",
    ]


_PLACES = {
    "loaded": "loaded",
    "loading": "being loaded",
    "fits": "fits",
    "cannot": "too big",
    "unknown": "VRAM unknown",
}


def _place(node: Mapping[str, Any]) -> str:
    if "verdict" not in node:
        return node["health"] if node["health"] != "up" else "nobody has the model"
    verdict = node["verdict"]
    if verdict == "evicts":
        text = f"fits after {', '.join(node['evicts'])}" if node["evicts"] else "fits, reloaded"
    elif verdict == "offloads":
        text = f"{node['cpu_share']:.0%} in system memory"
        if node["evicts"]:
            text += f" after {', '.join(node['evicts'])}"
    else:
        text = _PLACES[verdict]
    return text if node["installed"] else f"{text}; not pulled"


def _need(node: Mapping[str, Any]) -> str:
    if "verdict" not in node:
        return ""
    low, need, high = node["need_low_gb"], node["need_gb"], node["need_high_gb"]
    if high - low < 0.1 * need:
        return f"{need:.1f} GB"
    return f"{need:.1f} GB ({min(low, need):.1f} to {max(high, need):.1f})"


def resources_of(node: NodeSnapshot, now: float) -> dict[str, Any]:
    """One node as plain data: memory in decimal GB, ages in seconds, None for what is unknown."""
    seen = node.vram_observed_at
    return {
        "id": node.id,
        "url": node.node.url,
        "healthy": None if node.health == "unknown" else node.health == "up",
        "health": node.health,
        "health_reason": node.health_reason,
        "is_local": node.node.local,
        "version": node.version,
        "vram_total_gb": _gb(node.total_vram_bytes),
        "vram_available_gb": _gb(node.free_vram_bytes),
        "vram_source": node.vram_source,
        "vram_age_s": None if seen is None else round(max(0.0, now - seen), 3),
        "vram_reasons": list(node.vram_reasons),
        "devices": [_device(device, now) for device in node.devices],
        "ram_total_gb": _gb(node.ram_bytes),
        "age_s": None if node.observed_at is None else round(max(0.0, now - node.observed_at), 3),
        "loaded_models": [
            {
                "name": model.name,
                "size_gb": _gb(model.size_bytes),
                "vram_gb": _gb(model.size_vram_bytes),
                "context_length": model.context_length,
            }
            for model in node.loaded.values()
        ],
        "installed_models": sorted(node.installed),
        "in_flight": len(node.running),
        "circuit": node.circuit,
        "cordoned": node.cordoned,
        "load_path_stuck": node.load_path_stuck,
        "labels": list(node.node.labels),
    }


def _device(device: Device, now: float) -> dict[str, Any]:
    """One GPU, and who holds its memory where that is told."""
    seen = device.observed_at
    held = device.processes
    return {
        "key": device.key,
        "name": device.name,
        "vendor": device.vendor,
        "kind": device.kind,
        "total_gb": _gb(device.total_bytes),
        "used_gb": _gb(device.used_bytes),
        "free_gb": _gb(device.free_bytes),
        "utilization": device.utilization,
        "source": device.source,
        "age_s": None if seen is None else round(max(0.0, now - seen), 3),
        "processes": None
        if held is None
        else [
            {
                "pid": one.pid,
                "name": one.name,
                "owner": one.owner,
                "used_gb": _gb(one.used_bytes),
            }
            for one in held
        ],
    }


def _gb(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / GB, 3)


def _gb_text(gigabytes: float | None) -> str:
    return "?" if gigabytes is None else f"{gigabytes:.1f} GB"


def _health(node: dict[str, Any]) -> str:
    states = [node["health"] if node["health"] != "unknown" else "not seen yet"]
    states += ["cordoned"] if node["cordoned"] else []
    states += ["circuit open"] if node["circuit"] != "closed" else []
    states += ["loads stuck"] if node["load_path_stuck"] else []
    return ", ".join(states)


def _vram(node: dict[str, Any]) -> str:
    free, total = node["vram_available_gb"], node["vram_total_gb"]
    if total == 0:
        return "none, CPU only"
    if free is None:
        return "unknown"
    return f"{free:.1f} GB" + (f" of {total:.1f}" if total is not None else "")


def _memory(node: dict[str, Any]) -> dict[str, float]:
    """What fills the GPU, by name, in GB."""
    parts = {model["name"]: model["vram_gb"] or 0.0 for model in node["loaded_models"]}
    free, total = node["vram_available_gb"], node["vram_total_gb"]
    if free is None:
        return {**parts, "unknown": max(0.0, total - sum(parts.values()))}
    return {**parts, "in use": max(0.0, total - free - sum(parts.values())), "free": free}


def _source(node: dict[str, Any]) -> str:
    if node["vram_source"] is None:
        return ""
    seconds = node["vram_age_s"]
    return str(node["vram_source"]) + ("" if seconds is None else f", {seconds:.0f} s ago")
