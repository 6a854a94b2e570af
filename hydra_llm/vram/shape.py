"""A model as far as its memory is concerned, read once from ``/api/show``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra_llm.vram.accounting import OldFigures, read_old_figures
from hydra_llm.vram.compute import Graph, read_graph
from hydra_llm.vram.layers import ENCODERS, KV_BYTES, UNKNOWN, Layer, Layers, read_layers
from hydra_llm.vram.metadata import Metadata, whole
from hydra_llm.vram.tensors import read_tensors
from hydra_llm.vram.weights import Weights, read_weights

__all__ = ["ModelShape"]

CELLS = 256
"""Caches hold a multiple of so many tokens."""

MOST_TOKENS = 1 << 32

SINGLE_SLOT = frozenset(
    "mllama qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3next lfm2 lfm2moe nemotron_h nemotron_h_moe "
    "nemotron_h_omni".split()
)
"""Architectures that Ollama never gives more than one slot (``server/sched.go`` of v0.32.15)."""


def padded(tokens: int) -> int:
    """Cells that a cache for so many tokens has."""
    return -(-tokens // CELLS) * CELLS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # compared and hashed as itself
class ModelShape:
    """
    What decides how much memory a model takes: small, and the same on every node.

    ::

        shape = ModelShape.from_show(show, size)
        shape.kv_bytes(32_768)

    Whatever ``show`` holds, reading it does not fail: what makes no sense counts as not given.
    """

    architecture: str = ""
    size_bytes: int = 0
    """Of the file, as in ``/api/tags``."""
    context_length: int | None = None
    """The longest context it was trained for; Ollama gives no longer one."""
    layer_count: int | None = None
    layers: Layers
    weights: Weights
    graph: Graph
    old: OldFigures
    embeds: bool = False
    """An embedding model, which is given larger batches and one slot."""
    draft: int = 0
    """Tokens it predicts ahead by itself, as its Modelfile says."""

    @classmethod
    def from_show(cls, show: object, size: int | None = None) -> ModelShape:
        """
        From an answer of ``/api/show`` and the model's size in ``/api/tags``.

        Either may be None. ``verbose`` is not needed; where its arrays are, they are used.
        """
        size = whole(size, 1 << 60) or 0
        about = Metadata(show)
        table = read_tensors(about.show.get("tensors"))
        layers = read_layers(about, table)
        count = len(layers.each) if layers is not UNKNOWN else 0
        weights = read_weights(about, table, size, count)
        vocabulary = about.whole("vocab_size") or (table.vocabulary if table else 0)
        return cls(
            architecture=about.architecture,
            size_bytes=size,
            context_length=about.whole("context_length", MOST_TOKENS),
            layer_count=count or None,
            layers=layers,
            weights=weights,
            graph=read_graph(about, layers, vocabulary),
            old=read_old_figures(about, count, vocabulary),
            embeds=_embeds(about),
            draft=min(about.parameter("draft_num_predict") or 0, 64),
        )

    def slots(self, num_parallel: int) -> int:
        """Slots that Ollama makes of ``OLLAMA_NUM_PARALLEL``: some models are given one only."""
        alone = self.embeds or self.architecture in SINGLE_SLOT
        return 1 if alone else max(1, num_parallel)

    def context(self, num_ctx: int) -> int:
        """Tokens of context that a runner asked for ``num_ctx`` has."""
        asked = min(max(num_ctx, 4), MOST_TOKENS)  # no less than 4: server/sched.go
        return min(asked, self.context_length) if self.context_length else asked

    def cells(self, num_ctx: int, batch: int) -> tuple[int, int]:
        """Cells a slot of the cache for the whole context, and of that for a window."""
        every = padded(self.context(num_ctx))
        return every, min(every, padded(self.layers.window + batch))

    def kv_bytes(
        self,
        num_ctx: int,
        num_parallel: int = 1,
        kv_type: str = "f16",
        *,
        batch: int | None = None,
        flash: bool = True,
    ) -> int:
        """
        Key/value cache and recurrent state, in bytes.

        Args:
            num_ctx: tokens of context a slot.
            num_parallel: slots.
            kv_type: of the cache's elements, as in ``OLLAMA_KV_CACHE_TYPE``.
            batch: tokens that pass through at once; what Ollama would choose if not given.
            flash: whether flash attention is on.
        """
        if batch is None:
            batch = automatic_batch(self.context(num_ctx) * num_parallel)
        every, window = self.cells(num_ctx, batch)
        one = self.slot_bytes(self.layers.counted, every, window, kv_type, flash=flash)
        return num_parallel * (one + self.state_bytes())

    def slot_bytes(
        self,
        counted: tuple[tuple[Layer, int], ...],
        every: int,
        window: int,
        kv_type: str,
        *,
        flash: bool = True,
    ) -> int:
        """Key/value cache of some layers for one slot."""
        size, elements = KV_BYTES[kv_type]
        # Without flash attention values are stored the other way round, all as wide as the widest.
        widest = 0 if flash else self.layers.widest_value
        total = 0
        for layer, number in counted:
            if layer.sees != "nothing":
                value = max(layer.value, widest) if layer.value else 0
                cells = window if layer.sees == "window" else every
                total += number * cells * (layer.key + value)
        return total * size // elements

    def state_bytes(self) -> int:
        """Recurrent state of one slot."""
        return 4 * sum(layer.state * number for layer, number in self.layers.counted)

    def with_weights(self, gpu_bytes: int) -> ModelShape:
        """The same model, with the weights on the GPU as they were logged or measured."""
        return replace(self, weights=self.weights.known(gpu_bytes))

    def __repr__(self) -> str:
        what = self.architecture or "unknown"
        layers = "unknown layers" if self.layer_count is None else f"{self.layer_count} layers"
        return f"<ModelShape {what}, {layers}, {self.size_bytes / 1e9:.2f} GB>"


def automatic_batch(
    tokens: int, predicted_bytes: int | None = None, available_bytes: int | None = None
) -> int:
    """
    ``num_batch`` that Ollama >= 0.30 takes by itself (``automaticGenerationBatch``).

    Args:
        tokens: of context, all slots together.
        predicted_bytes: what Ollama thinks that the model needs.
        available_bytes: on the GPUs; enough if not given.
    """
    batch = 2048 if tokens > 32_768 else 1024 if tokens > 4096 else 512
    if predicted_bytes and available_bytes:
        spare = available_bytes * 80 // 100 - predicted_bytes
        if batch == 2048 and (
            predicted_bytes > available_bytes * 60 // 100 or spare < BATCH_SURCHARGE_BYTES[2048]
        ):
            batch = 1024
        if batch == 1024 and (
            predicted_bytes > available_bytes * 75 // 100 or spare < BATCH_SURCHARGE_BYTES[1024]
        ):
            batch = 512
    return batch


BATCH_SURCHARGE_BYTES = {2048: 2 << 30, 1024: 768 << 20}
"""What Ollama >= 0.30 expects of a batch beyond 512 (BEHAVIOUR section 11)."""


def _embeds(about: Metadata) -> bool:
    told = about.show.get("capabilities")
    if isinstance(told, list) and told:
        return "embedding" in told and "completion" not in told
    return about.architecture in ENCODERS or "pooling_type" in about
