"""What a model will need, part by part, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hydra_llm.tables import text_table
from hydra_llm.vram.accounting import Era
from hydra_llm.vram.shape import ModelShape

__all__ = ["MemoryNeed", "MemoryPart"]


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a model's memory, in bytes, and where the figure is from."""

    name: str
    bytes: int
    source: str
    low_bytes: int
    high_bytes: int
    place: Literal["gpu", "host"] = "gpu"
    reported: bool = True
    """Whether Ollama counts it in ``size`` of ``/api/ps``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """
    What one runner of a model will hold, with all layers on the GPU.

    ::

        need = estimate(show, size, 8192)
        need.total_bytes, need.low_bytes, need.high_bytes
        print(need)  # a table of its parts

    Without a GPU (``gpus=0``) it is what the runner will hold in system memory.
    """

    shape: ModelShape
    num_ctx: int
    """Tokens of context a slot, no more than the model was trained for."""
    num_parallel: int
    kv_type: str
    batch: int
    """Tokens that pass through at once (``num_batch``)."""
    gpus: int
    era: Era
    parts: tuple[MemoryPart, ...]
    per_gpu: tuple[int, ...] = ()
    """Each GPU's share, if they have the same amount free; empty without a GPU."""
    layer_kv_bytes: tuple[int, ...] = ()
    """Cache and state of each layer."""
    forecast_bytes: int = 0
    """What that version of Ollama itself expects before it loads, right or wrong: by this it
    decides which other models have to go."""
    again: Callable[[int], MemoryNeed] = field(repr=False, compare=False)
    """The same question for another ``num_ctx``."""

    @property
    def _counted(self) -> list[MemoryPart]:
        place = "gpu" if self.gpus else "host"
        return [part for part in self.parts if part.place == place]

    @property
    def total_bytes(self) -> int:
        """On all GPUs together."""
        return sum(part.bytes for part in self._counted)

    @property
    def low_bytes(self) -> int:
        """It will hardly be less."""
        return sum(part.low_bytes for part in self._counted)

    @property
    def high_bytes(self) -> int:
        """It will hardly be more."""
        return sum(part.high_bytes for part in self._counted)

    @property
    def host_bytes(self) -> int:
        """What stays in system memory: above all the token embedding."""
        return sum(part.bytes for part in self.parts if part.place == "host")

    @property
    def reported_bytes(self) -> int:
        """
        What ``size`` in ``/api/ps`` of that version should say.

        From 0.30 on Ollama loses a cache of models with a sliding window, and what a draft
        needs, so the real figure may be lower for them.
        """
        return sum(part.bytes for part in self.parts if part.reported)

    def kv_bytes(self, num_ctx: int | None = None) -> int:
        """Key/value cache and recurrent state, as they are or for another context."""
        need = self if num_ctx is None else self.again(num_ctx)
        return need.part("key/value cache") + need.part("recurrent state")

    def at(self, num_ctx: int) -> MemoryNeed:
        """The need with another context, all else the same."""
        return self.again(num_ctx)

    @property
    def layer_count(self) -> int | None:
        """The model's layers without its output; None if they are not known."""
        return self.shape.layer_count

    @property
    def bytes_per_layer(self) -> tuple[int, ...]:
        """
        Weights, cache and state of each layer, and last of the output.

        llama.cpp leaves layers on the host from the first on, so the last ones are those on a
        GPU that has no room for all. Empty if the layers are not known.
        """
        if not self.shape.layer_count:
            return ()
        weights = self.shape.weights
        layers = zip(weights.blocks, self.layer_kv_bytes, strict=True)
        return (*(block + kv for block, kv in layers), weights.head + weights.other)

    def gpu_bytes(self, layers: int) -> int:
        """
        What the GPUs hold if only so many layers are on them, the output counted as one.

        Raises:
            ValueError: if the layers are not known.
        """
        each = self.bytes_per_layer
        if not each:
            raise ValueError("nothing tells of this model's layers")
        kept = max(0, len(each) - max(0, layers))
        return self.total_bytes - sum(each[:kept]) if layers > 0 and self.gpus else 0

    def part(self, name: str) -> int:
        """Bytes of the part of that name; 0 if there is none."""
        return sum(part.bytes for part in self.parts if part.name == name)

    def __repr__(self) -> str:
        what = self.shape.architecture or "unknown"
        slots = f" x {self.num_parallel}" if self.num_parallel > 1 else ""
        return (
            f"<MemoryNeed {_gb(self.total_bytes)} GB ({_gb(self.low_bytes)} to "
            f"{_gb(self.high_bytes)}) for {what}, {self.num_ctx} tokens{slots}, {self.kv_type}>"
        )

    def __str__(self) -> str:
        rows = [_row(part.name, part.place, part, part.source) for part in self.parts]
        place = "gpu" if self.gpus else "host"
        rows.append(
            (
                "total",
                place,
                _gb(self.total_bytes),
                f"{_gb(self.low_bytes)} to {_gb(self.high_bytes)}",
                "",
            )
        )
        return text_table(("part", "on", "GB", "between", "from"), rows)


def _row(name: str, place: str, part: MemoryPart, source: str) -> tuple[str, ...]:
    between = f"{_gb(part.low_bytes)} to {_gb(part.high_bytes)}"
    sure = part.low_bytes == part.high_bytes
    return name, place, _gb(part.bytes), "" if sure else between, source


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
