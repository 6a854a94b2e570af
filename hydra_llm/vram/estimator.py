"""Estimates what a model will need before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any

from hydra_llm.vram.accounting import (
    OLLAMA_ENGINE,
    Era,
    era_of,
    has_old_graph,
    old_graph_bytes,
    old_kv_bytes,
)
from hydra_llm.vram.compute import compute_bytes, mask_bytes, pipeline_bytes
from hydra_llm.vram.layers import KV_BYTES, Layer
from hydra_llm.vram.need import MemoryNeed, MemoryPart
from hydra_llm.vram.shape import BATCH_SURCHARGE_BYTES, ModelShape, automatic_batch

__all__ = ["estimate"]

MIB = 1 << 20

CONTEXT_BYTES = 457 * MIB
"""CUDA context and the like, per runner and GPU: Ollama's own minimum up to 0.24."""

METAL_CONTEXT_BYTES = 512 * MIB
"""The same in its forecasts for Metal."""

CONTEXT_LOW_BYTES = 73 * MIB
"""The least that anybody reported."""

UNEXPLAINED = 0.015
"""Two readings of NVML were 1.1 and 1.4 % above what the parts add up to."""

PROJECTOR_GRAPH_BYTES = 1 << 30
"""What Ollama leaves free for a projector's own graph (``mmprojOffloadHeadroom``)."""

COMPUTE_BETWEEN = {True: (0.85, 1.2), False: (0.5, 2.0)}
"""Factors for architectures whose graphs were seen, and for others."""

GUESS_BETWEEN = (0.3, 3.0)
GUESSED_ROW, GUESSED_AT_BYTES = 55_296, 4_920_753_328
"""Row and file size of Llama 3.1 8B; a row grows as the root of the size, or nearly."""

SIZE_UNKNOWN_BYTES = 4_920_753_328
"""Taken for a model of which not even the size is known."""


def estimate(  # noqa: PLR0917  by place as by name: six is what there is to say
    show: Mapping[str, Any] | ModelShape | None,
    size: int | None,
    num_ctx: int,
    num_parallel: int = 1,
    kv_type: str = "f16",
    gpus: int = 1,
    ollama_version: str | None = None,
    *,
    num_batch: int | None = None,
    flash: bool = True,
    weights_bytes: int | None = None,
    backend: str | None = None,
    available_bytes: int | None = None,
    draft: int | None = None,
) -> MemoryNeed:
    """
    What a runner of the model will hold with all layers on the GPU.

    ::

        need = estimate(client.show(model), size, 8192, kv_type="q8_0")

    Nothing in ``show`` makes it fail: what is missing or makes no sense is worked out from the
    size, and the interval becomes wider.

    Args:
        show: the answer of ``/api/show``, without ``verbose``; a :class:`ModelShape` read from
            one, which is faster; or None.
        size: of the model in bytes, from ``/api/tags``.
        num_ctx: tokens of context a slot.
        num_parallel: slots the runner has; see :meth:`ModelShape.slots` for models that are
            given one only.
        kv_type: ``OLLAMA_KV_CACHE_TYPE`` of the node; ``f16`` counts without flash attention.
        gpus: GPUs it is split over; 0 for a node without any.
        ollama_version: of the node, for versions that reckoned otherwise; the newest if None.
        num_batch: tokens that pass through at once; by default what Ollama chooses.
        flash: whether flash attention is on.
        weights_bytes: the weights on the GPU, where a log told them.
        backend: ``cuda``, ``rocm``, ``metal`` or ``vulkan``, if known.
        available_bytes: free on the GPUs; Ollama takes smaller batches where little is.
        draft: tokens predicted ahead by the model itself; what its Modelfile says if None.

    Raises:
        ValueError: for a ``kv_type`` that llama.cpp does not have.
    """
    kv_type = (kv_type or "f16").lower()
    if kv_type not in KV_BYTES:
        raise ValueError(f"kv_type must be one of {', '.join(KV_BYTES)}, not {kv_type!r}")
    shape = show if isinstance(show, ModelShape) else ModelShape.from_show(show, size)
    if weights_bytes is not None:
        shape = shape.with_weights(weights_bytes)
    question = _Question(
        shape=shape,
        num_ctx=shape.context(num_ctx),
        slots=max(1, num_parallel),
        kv_type=kv_type if flash else _unquantised(kv_type),
        gpus=max(0, gpus),
        version=ollama_version,
        num_batch=num_batch,
        flash=flash,
        backend=(backend or "").lower(),
        available=available_bytes,
        draft=shape.draft if draft is None else max(0, draft),
    )
    return _answered(question)


def _unquantised(kv_type: str) -> str:
    # llama.cpp stores no quantised values without flash attention.
    return kv_type if kv_type in {"f32", "bf16"} else "f16"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    shape: ModelShape
    num_ctx: int
    slots: int
    kv_type: str
    gpus: int
    version: str | None
    num_batch: int | None
    flash: bool
    backend: str
    available: int | None
    draft: int


def _answered(question: _Question) -> MemoryNeed:
    era = era_of(question.version)
    old = question.shape.old
    forecast = era != "llama_server" and old.known and question.gpus > 0
    if forecast and not (era == "engine" and _in_ollamas_engine(question)):
        return _Forecast(question).need()
    return _Buffers(question).need()


def _in_ollamas_engine(question: _Question) -> bool:
    """Whether real buffers were counted, or a layout that knows of recurrent layers is due."""
    return question.shape.architecture in OLLAMA_ENGINE or question.shape.layers.recurrent


def _again(question: _Question, num_ctx: int) -> MemoryNeed:
    return _answered(replace(question, num_ctx=question.shape.context(num_ctx)))


class _Buffers:
    """What llama-server allocates: the buffers that its log lists, and what no log does."""

    def __init__(self, question: _Question) -> None:
        self.q = question
        self.shape = question.shape
        self.era: Era = era_of(question.version)
        self.batch = self._batch(question.available)
        self.every, self.window = self.shape.cells(question.num_ctx, self.batch)

    def need(self) -> MemoryNeed:
        q, shape = self.q, self.shape
        state = q.slots * (1 + q.draft) * shape.state_bytes()
        compute, compute_low, compute_high = self._compute()
        weights = self._weights()
        parts = [weights, self._cache()]
        if state:
            parts.append(_sure("recurrent state", state, "model_info: 32-bit state of each slot"))
        name = "graph of the newest llama.cpp" if not self.old else "graph of llama.cpp up to b9000"
        if not shape.graph.known:
            name = "guessed from the file size"
        parts.append(MemoryPart("compute", compute, name, compute_low, compute_high))
        if q.draft:
            parts.append(self._draft())
        if q.gpus:
            parts += self._unlogged(weights.bytes)
        parts += self._host()
        if not q.gpus:
            parts = [replace(part, place="host") for part in parts]
        return MemoryNeed(
            shape=shape,
            num_ctx=q.num_ctx,
            num_parallel=q.slots,
            kv_type=q.kv_type,
            batch=self.batch,
            gpus=q.gpus,
            era=self.era,
            parts=tuple(parts),
            per_gpu=self._per_gpu(parts),
            layer_kv_bytes=self._layer_kv(),
            forecast_bytes=self._forecast(parts),
            again=partial(_again, q),
        )

    def _forecast(self, parts: Sequence[MemoryPart]) -> int:
        if self.era != "llama_server":
            return sum(part.bytes for part in parts if part.place == "gpu" or not self.q.gpus)
        tokens = self.q.num_ctx * self.q.slots
        expected = self._predicted(tokens)
        if not self.shape.old.known:
            # It reads the file, and we know nothing of it.
            expected += sum(part.bytes for part in parts if part.name == "key/value cache")
        if self.q.num_batch or self.shape.embeds:
            return expected
        return expected + BATCH_SURCHARGE_BYTES.get(self.batch, 0)

    @property
    def old(self) -> bool:
        return has_old_graph(self.q.version)

    # ------------------------------------------------------------------ batches

    def _batch(self, available: int | None) -> int:
        q = self.q
        tokens = q.num_ctx * q.slots
        if q.num_batch:
            return max(1, min(q.num_batch, tokens))
        if self.shape.embeds:
            return min(2048, q.num_ctx)
        if self.era != "llama_server" or (not q.flash and q.backend == "cuda"):
            return min(512, tokens)
        return min(automatic_batch(tokens, self._predicted(tokens), available), tokens)

    def _predicted(self, tokens: int) -> int:
        """What Ollama >= 0.30 itself expects (``PredictServerVRAM``)."""
        old = self.shape.old
        head = old.width // old.heads if old.heads else 0
        return self.shape.size_bytes + 4 * old.layers * old.fewest_kv_heads * head * tokens

    # -------------------------------------------------------------------- parts

    def _weights(self) -> MemoryPart:
        weights = self.shape.weights
        if not weights.gpu and not weights.exact:
            guess = SIZE_UNKNOWN_BYTES
            return MemoryPart("weights", guess, "nothing tells of the size", guess // 8, 8 * guess)
        return MemoryPart("weights", weights.gpu, weights.source, weights.low, weights.high)

    def _cache(self) -> MemoryPart:
        q, layers = self.q, self.shape.layers
        draft = self._draft_cache()
        kv = q.slots * self._slot(layers.each) + draft
        least = kv if layers.least is None else q.slots * self._slot(layers.least) + draft
        most = kv if layers.most is None else q.slots * self._slot(layers.most) + draft
        source = f"{q.kv_type}, {layers.source}"
        return MemoryPart("key/value cache", kv, source, min(kv, least), max(kv, most))

    def _slot(self, each: tuple[Layer, ...]) -> int:
        layers = self.shape.layers
        counted = layers.counted if each is layers.each else tuple((one, 1) for one in each)
        return self.shape.slot_bytes(
            counted, self.every, self.window, self.q.kv_type, flash=self.q.flash
        )

    def _cells(self, batch: int) -> tuple[int, int]:
        """Cells that a token may look at, in all caches and in that of the whole context."""
        layers = self.shape.layers
        if not layers.attention:
            return 0, 0
        every, window = self.shape.cells(self.q.num_ctx, batch)
        return every + (window if layers.windowed else 0), every

    def _one_gpu(self, batch: int) -> int:
        """Compute buffer of a GPU that has the whole model."""
        q, graph = self.q, self.shape.graph
        cells, every = self._cells(batch)
        if not graph.known:
            size = self.shape.size_bytes or SIZE_UNKNOWN_BYTES
            row = GUESSED_ROW * isqrt(size) // isqrt(GUESSED_AT_BYTES)
            return 4 * batch * row + mask_bytes(batch, cells, flash=q.flash)
        return compute_bytes(
            graph,
            batch=batch,
            cells=cells,
            all_cells=every,
            flash=q.flash,
            quantised=q.kv_type not in {"f32", "f16", "bf16"},
            old=self.old,
        )

    def _pipeline(self, batch: int) -> tuple[int, int]:
        if self.q.gpus < 2:
            return 0, 0
        cells, _ = self._cells(batch)
        return pipeline_bytes(self.shape.graph, batch=batch, cells=cells, flash=self.q.flash)

    def _all_gpus(self, batch: int) -> int:
        first, further = self._pipeline(batch)
        count = max(1, self.q.gpus)
        return count * self._one_gpu(batch) + first + (count - 1) * further

    def _compute(self) -> tuple[int, int, int]:
        compute = self._all_gpus(self.batch)
        graph = self.shape.graph
        low, high = COMPUTE_BETWEEN[graph.measured] if graph.known else GUESS_BETWEEN
        least = int(compute * low)
        automatic = not self.q.num_batch and not self.shape.embeds and self.q.available is None
        if automatic and self.batch > 512:  # little free memory makes Ollama take less
            least = min(least, int(self._all_gpus(512) * low))
        return compute, least, int(compute * high)

    def _draft_cache(self) -> int:
        """A model that predicts ahead keeps one more layer of attention, at 16 bits."""
        if not self.q.draft:
            return 0
        widest = max(layer.key + layer.value for layer in self.shape.layers.each)
        return 2 * self.q.slots * self.every * widest

    def _draft(self) -> MemoryPart:
        graph = self._one_gpu(self.batch)
        return MemoryPart("draft", graph, "a second graph (llama.cpp's MTP)", 0, 2 * graph)

    def _unlogged(self, weights: int) -> list[MemoryPart]:
        q = self.q
        parts = []
        copy = self._dequantised()
        if copy:
            counted = q.backend in {"cuda", "rocm"}
            parts.append(
                MemoryPart(
                    "copy of the cache",
                    copy if counted else 0,
                    "source of CUDA's flash attention, not measured",
                    0,
                    copy if q.backend in {"", "cuda", "rocm"} else 0,
                    reported=counted and not self.old and self.era == "llama_server",
                )
            )
        projector = self.shape.weights.projector
        if projector:
            parts.append(
                MemoryPart(
                    "projector",
                    projector,
                    "tensor table" if self.shape.weights.exact else "vision figures of model_info",
                    projector if self.shape.weights.exact else 0,
                    projector + PROJECTOR_GRAPH_BYTES,
                    reported=False,
                )
            )
        context = q.gpus * CONTEXT_BYTES
        low = 0 if q.backend == "metal" else q.gpus * CONTEXT_LOW_BYTES
        high = context + int(UNEXPLAINED * (weights + context))
        source = "Ollama's minimum for a GPU"
        parts.append(MemoryPart("overhead", context, source, low, high, reported=False))
        return parts

    def _dequantised(self) -> int:
        """CUDA reads a quantised cache layer by layer through a copy at 16 bits."""
        if self.q.kv_type in {"f32", "f16", "bf16"} or not self.q.flash:
            return 0
        layers = self.shape.layers.counted
        sizes = [
            (self.window if layer.sees == "window" else self.every) * (layer.key + layer.value)
            for layer, _ in layers
            if layer.sees != "nothing"
        ]
        return 2 * self.q.slots * max(sizes, default=0)

    def _host(self) -> list[MemoryPart]:
        weights = self.shape.weights
        # In its own engine Ollama counted the embedding on the host too.
        own = self.era == "engine" and self.shape.architecture in OLLAMA_ENGINE
        reported = own or not self.q.gpus
        # Without a GPU there is no second copy of an embedding that is the output too.
        embedding = 0 if weights.tied and not self.q.gpus else weights.embedding
        source = weights.source
        parts = [
            ("token embedding", embedding + weights.inputs),
            ("per-layer embedding", weights.layer_embedding),
            ("projector", 0 if self.q.gpus else weights.projector),
            ("input of a batch", 0 if self.q.gpus else 4 * self.batch * self.shape.graph.width),
        ]
        return [
            MemoryPart(name, size, source, size, size, place="host", reported=reported)
            for name, size in parts
            if size
        ]

    # --------------------------------------------------------------- the layers

    def _layer_kv(self) -> tuple[int, ...]:
        q = self.q
        sizes: dict[Layer, int] = {
            layer: q.slots * (self._slot_of(layer) + 4 * (1 + q.draft) * layer.state)
            for layer, _ in self.shape.layers.counted
        }
        return tuple(sizes[layer] for layer in self.shape.layers.each)

    def _slot_of(self, layer: Layer) -> int:
        return self.shape.slot_bytes(
            ((layer, 1),), self.every, self.window, self.q.kv_type, flash=self.q.flash
        )

    def _per_gpu(self, parts: list[MemoryPart]) -> tuple[int, ...]:
        count = self.q.gpus
        on_gpu = [part for part in parts if part.place == "gpu"]
        total = sum(part.bytes for part in on_gpu)
        if count < 2:
            return (total,) * count
        shares = _split(self.shape, self._layer_kv(), count)
        first, further = self._pipeline(self.batch)
        one = self._one_gpu(self.batch)
        for i in range(count):
            shares[i] += one + (further if i else first) + CONTEXT_BYTES
        # The projector goes to the first GPU, a draft's layer to the last.
        shares[0] += sum(part.bytes for part in on_gpu if part.name == "projector")
        shares[-1] += total - sum(shares)
        return tuple(shares)


def _split(shape: ModelShape, layer_kv: tuple[int, ...], count: int) -> list[int]:
    """Weights and cache of each of several GPUs that have the same amount free."""
    blocks = shape.weights.blocks
    shares = [0] * count
    for i, block in enumerate(blocks):
        shares[min(count - 1, i * count // (len(blocks) + 1))] += block
    for i, kv in enumerate(layer_kv):
        shares[min(count - 1, i * count // (len(layer_kv) + 1))] += kv
    shares[-1] += shape.weights.head + shape.weights.other
    return shares


def _largest_layer(blocks: Sequence[int], layer_kv: Sequence[int]) -> int:
    return max(map(sum, zip(blocks, layer_kv, strict=False)), default=0)


class _Forecast:
    """What Ollama up to 0.24 expected, which decided what it loaded and where."""

    def __init__(self, question: _Question) -> None:
        self.q = question
        self.shape = question.shape
        self.era: Era = era_of(question.version)

    def need(self) -> MemoryNeed:
        q, shape = self.q, self.shape
        batch = min(q.num_batch or 512, q.num_ctx * q.slots)
        if shape.embeds and self.era == "engine":
            batch = max(batch, q.num_ctx)
        kv = old_kv_bytes(
            shape.old, num_ctx=q.num_ctx, slots=q.slots, batch=batch, kv_type=q.kv_type
        )
        graph = old_graph_bytes(
            shape.old, sum(kv), num_ctx=q.num_ctx, slots=q.slots, batch=batch, flash=q.flash
        )
        weights = shape.weights
        loaded = weights.gpu - weights.other
        legacy = self.era == "legacy"
        source = f"forecast of Ollama {'<= 0.11.10' if legacy else '0.11.11 to 0.24'}"
        count = q.gpus
        parts = [
            MemoryPart("weights", loaded, weights.source, min(loaded, weights.low), weights.high),
            MemoryPart("key/value cache", sum(kv), source, sum(kv) // 2, sum(kv)),
            MemoryPart("compute", count * graph, source, 0, 2 * count * graph),
        ]
        context = METAL_CONTEXT_BYTES if q.backend == "metal" else CONTEXT_BYTES
        if legacy:
            buffer = (weights.blocks[0] if weights.blocks else 0) + kv[0]
            parts.append(MemoryPart("buffer", count * buffer, source, 0, count * buffer))
        parts.append(
            MemoryPart("overhead", count * context, source, 0, 2 * count * context, "gpu", legacy)
        )
        if weights.projector:
            high = weights.projector + PROJECTOR_GRAPH_BYTES
            parts.insert(-1, MemoryPart("projector", weights.projector, source, 0, high))
        if weights.host:
            host = weights.host
            parts.append(
                MemoryPart("token embedding", host, weights.source, host, host, "host", False)
            )
        total = sum(part.bytes for part in parts if part.place == "gpu")
        split = _split(shape, tuple(kv), count)
        rest = total - sum(split)
        shares = [one + rest // count for one in split]
        shares[0] += total - sum(shares)
        return MemoryNeed(
            shape=shape,
            num_ctx=q.num_ctx,
            num_parallel=q.slots,
            kv_type=q.kv_type,
            batch=batch,
            gpus=count,
            era=self.era,
            parts=tuple(parts),
            per_gpu=tuple(shares),
            layer_kv_bytes=tuple(kv),
            # A layout has to leave room for one layer more (BEHAVIOUR section 11).
            forecast_bytes=total + (0 if legacy else _largest_layer(weights.blocks, kv)),
            again=partial(_again, q),
        )


def _sure(name: str, size: int, source: str) -> MemoryPart:
    return MemoryPart(name, size, source, size, size)
