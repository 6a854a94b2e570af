"""What is known of real models' memory, and what the estimator says of the same.

``published.csv``: what Ollama, or llama-server under it, reported and somebody published; mostly
the git history of attogram/ollama-bash-lib (MIT) and logs in public repositories. ``measured.csv``:
plans of llama.cpp's own planner (b10488) for files with the tensors of published models and no
data. ``shows.json``: answers of ``/api/show`` to some of the published, cut to what is read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra_llm.vram import MemoryNeed, estimate

DATA = Path(__file__).parent / "data"

View = Literal["tensors", "weights", "size"]
"""Whether ``/api/show`` has its tensor table, the weights are given, or the file size alone is."""

VERSIONS = {"legacy": "0.9.6", "legacy_fa": "0.11.10", "engine_llama": "0.14", "engine_go": "0.13"}
NEWEST = "0.32.15"
EARLY_2026 = "0.30.0"


@dataclass(frozen=True)
class Point:
    """One known figure: what there is to ask about, and the answer."""

    name: str
    model: str
    family: str
    show: dict[str, Any]
    tabled: dict[str, Any] | None
    size: int
    weights: int | None
    asked: dict[str, Any]
    low: float
    high: float
    """Equal, but for a figure that was published rounded."""
    parts: dict[str, int]
    """Bytes of its parts, where they were logged."""

    def views(self) -> list[View]:
        found: list[View] = ["tensors"] if self.tabled else []
        if self.weights:
            found.append("weights")
        if self.size:
            found.append("size")
        return found

    def estimate(self, view: View) -> MemoryNeed:
        show = self.tabled if view == "tensors" else self.show
        weights = self.weights if view == "weights" else None
        return estimate(show, self.size or None, **self.asked, weights_bytes=weights)

    def error(self, view: View) -> float:
        """How far what should be reported lies outside of what was, as a share of it."""
        said = self.estimate(view).reported_bytes
        nearest = min(max(said, self.low), self.high)
        return (said - nearest) / nearest


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def rows(name: str) -> Iterator[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def show_of(model: dict[str, Any]) -> dict[str, Any]:
    """An answer of ``/api/show`` with its tensor table, if the data have one."""
    show = {
        "model_info": model["model_info"],
        "details": {"quantization_level": model["level"]},
    }
    if "tensors" in model:
        show["tensors"] = [
            {"name": name, "type": kind, "shape": [int(one) for one in shape.split("x")]}
            for kind, shape, names in (
                (*described.split(), names) for described, names in model["tensors"].items()
            )
            for name in names.split()
        ]
    return show


@cache
def measured() -> list[Point]:
    models = read("models.json")
    found = []
    for row in rows("measured.csv"):
        model = models[row["model"]]
        parts = {name: int(row[f"meas_{name}"]) for name in ("weights", "context", "compute")}
        about = f"{row['kv_type']}, np {row['n_parallel']}, ub {row['num_batch']}"
        if row["flash"] == "0":
            about += ", no flash attention"
        if row["n_gpu"] != "1":
            about += f", {row['n_gpu']} GPUs"
        found.append(
            Point(
                name=f"{row['model']} at {row['num_ctx']} ({about})",
                model=row["model"],
                family=row["arch"],
                show=show_of(model),
                tabled=None,
                size=model["size"],
                weights=parts["weights"],
                asked={
                    "num_ctx": int(row["num_ctx"]),
                    "num_parallel": int(row["n_parallel"]),
                    "kv_type": row["kv_type"],
                    "gpus": int(row["n_gpu"]),
                    "num_batch": int(row["num_batch"]),
                    "flash": row["flash"] == "1",
                },
                low=sum(parts.values()),
                high=sum(parts.values()),
                parts=parts,
            )
        )
    return found


@cache
def published() -> list[Point]:
    shows = read("shows.json")
    found = []
    for row in rows("published.csv"):
        payload = shows.get(row["note"].removeprefix("show payload: "))
        keys = list(row)
        told = keys[keys.index("general.architecture") + 1 : keys.index("tied")]
        family = row["general.architecture"]
        info: dict[str, Any] = {"general.architecture": family}
        info |= {f"{family}.{key}": json.loads(row[key]) for key in told if row[key]}
        early = row["mask_bytes"] == "6" or row["old_graph"] == "1"
        version = VERSIONS.get(row["accounting"], EARLY_2026 if early else NEWEST)
        logged = ("weights", "kv", "recurrent", "compute")
        found.append(
            Point(
                name=f"{row['id']} {row['model']} at {row['num_ctx']}",
                model=row["model"].split()[0],
                family=family,
                show={"model_info": info, "details": {"quantization_level": row["quant"]}},
                tabled=show_of(payload) if payload else None,
                size=int(row["file_size"]),
                weights=int(row["weights_gpu_bytes"] or 0) or None,
                asked={
                    "num_ctx": int(row["num_ctx"]),
                    "num_parallel": int(row["n_parallel"]),
                    "kv_type": row["kv_type"],
                    "gpus": int(row["n_gpu"]),
                    "ollama_version": version,
                    "num_batch": int(row["num_batch"] or 0) or None,
                    "backend": row["backend"],
                    "available_bytes": int(row["available_bytes"] or 0) or None,
                    "draft": int(row["draft"]),
                },
                low=float(row["reported_lo"]),
                high=float(row["reported_hi"]),
                parts={name: int(row[f"rep_{name}"]) for name in logged if row[f"rep_{name}"]},
            )
        )
    return found
