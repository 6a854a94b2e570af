"""What a runner needs and where it goes: BEHAVIOUR section 11 as functions."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_llm.simulation.catalog import MIB, SimulatedModel
from hydra_llm.simulation.settings import NodeSettings

__all__ = ["Need", "Placement", "need_of", "place", "reserve_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that one runner of a model wants, and what the scheduler forecasts for it."""

    weights: int
    kv: int
    total: int
    """As ``/api/ps`` shows it in ``size``."""
    forecast: int
    """What the scheduler compares with free memory before it loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the bytes of a runner lie: on each GPU by its number, and in system memory."""

    gpu_bytes: tuple[int, ...]
    cpu_bytes: int

    @property
    def vram_bytes(self) -> int:
        """On all GPUs together."""
        return sum(self.gpu_bytes)

    @property
    def gpu_share(self) -> float:
        """The part of the runner that lies on GPUs, 0 to 1."""
        total = self.vram_bytes + self.cpu_bytes
        return self.vram_bytes / total if total else 0.0


def need_of(
    model: SimulatedModel, *, num_ctx: int, num_batch: int | None, slots: int, on: NodeSettings
) -> Need:
    """Estimate a runner's memory; the recordings' sizes are met within a fifth."""
    weights, tokens = model.size_bytes, num_ctx * slots
    kv = 0 if model.is_embedding else tokens * model.kv_bytes_per_token
    batch = num_batch or (512 if num_ctx <= 4096 or not on.is_modern else 1024)
    graph = batch * (4 * model.vocab_size + 40 * model.embedding_length + 2 * num_ctx)
    if on.is_modern:
        surcharge = 0 if num_ctx <= 4096 else 768 * MIB if num_ctx <= 32768 else 2048 * MIB
        forecast = weights + kv + (surcharge if num_batch is None else 0)
        return Need(weights=weights, kv=kv, total=weights + kv + graph, forecast=forecast)
    # Up to 0.24 the graph is a formula (``GraphSize``), and counted on GPUs only.
    graph = (
        4
        * batch
        * max(
            1 + 4 * model.embedding_length + tokens * (1 + model.head_count),
            model.embedding_length + model.vocab_size,
        )
    )
    # The input embedding stays in system memory and is not counted.
    resident = weights - min(weights // 2, 2 * model.embedding_length * model.vocab_size)
    total = resident + kv + (graph if on.gpus else 0)
    return Need(weights=weights, kv=kv, total=total, forecast=total)


def reserve_of(need: Need, *, layers: int) -> int:
    """What Ollama up to 0.24 leaves on each GPU: for CUDA itself, and one layer's size."""
    return 457 * MIB + need.total // (layers + 1)


def place(need: Need, *, free: tuple[int, ...], layers: int, num_gpu: int | None) -> Placement:
    """Put a runner on one GPU if it fits there, else on several, the rest in system memory."""
    total, units = need.total, layers + 1
    wanted = units if num_gpu is None or num_gpu < 0 else min(num_gpu, units)
    unit = total // units
    if wanted == units:
        for index in sorted(range(len(free)), key=lambda i: -free[i]):
            if total <= free[index]:
                return Placement(gpu_bytes=_only(index, total, len(free)), cpu_bytes=0)
    on_gpus: list[int] = []
    for room in free:
        count = min(wanted, max(0, room) // max(1, unit))
        wanted -= count
        on_gpus.append(count * unit)
    placed = sum(on_gpus)
    if on_gpus and wanted == 0 and placed == units * unit:
        on_gpus[-1] += total - placed if free[-1] >= on_gpus[-1] + total - placed else 0
    return Placement(gpu_bytes=tuple(on_gpus), cpu_bytes=total - sum(on_gpus))


def _only(index: int, amount: int, count: int) -> tuple[int, ...]:
    return tuple(amount if i == index else 0 for i in range(count))
