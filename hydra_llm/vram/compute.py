"""The compute buffers: what a batch needs while it passes through the graph.

Their size is the largest sum of what lives at one time, which llama.cpp's planner lays out. For
one GPU with flash attention that is, with ``ub`` tokens in a batch::

    4 ub row + 2 ub cells

``row`` are the floats a token has at the graph's peak, mostly in the feed-forward network; the
second term is the attention mask at 16 bits. Read off the planner's own results (llama.cpp
b10488), by kind of graph; no model has figures of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_llm.vram.layers import DELTA_NETS, ENCODERS, Layers
from hydra_llm.vram.metadata import Metadata

__all__ = ["Graph", "compute_bytes", "pipeline_bytes", "read_graph"]

PARALLEL_RESIDUAL = frozenset({"cohere2", "command-r"})
"""Attention and feed-forward network work side by side, so the input is kept for longer."""

LEAN = frozenset({"phi3", "lfm2", "lfm2moe"})
"""Attention's result is gone before the peak, as in all graphs with recurrent layers."""

MEASURED = frozenset(
    "llama qwen2 qwen3 qwen3moe gemma2 gemma3 gemma4 gpt-oss gptoss deepseek2 qwen35 qwen3next "
    "granitehybrid lfm2 cohere2 phi3 nomic-bert".split()
)
"""Architectures whose graphs were seen in the planner's results."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A model's widths that decide what its compute graph needs."""

    architecture: str = ""
    width: int = 0
    heads: int = 0
    attended: int = 0
    """Width of attention's result: heads * value length."""
    kv_width: int = 0
    row: int = 0
    """Floats a token at the peak, with flash attention."""
    row_quantised: int = 0
    """The same with a quantised cache."""
    layer_inputs: int = 0
    """Floats a token of per-layer embeddings, all layers together."""
    vocabulary: int = 0
    measured: bool = False

    @property
    def known(self) -> bool:
        """Whether the metadata told enough for the formula."""
        return self.row > 0


def read_graph(about: Metadata, layers: Layers, vocabulary: int) -> Graph:
    """The widths of a model's graph; one of unknown rows where they are not told."""
    name = about.architecture
    width = about.whole("embedding_length", 1 << 20) or 0
    heads = about.whole("attention.head_count", 1 << 14) or 0
    head = about.whole("attention.value_length", 1 << 14) or (width // heads if heads else 0)
    if about.whole("attention.key_length_mla"):
        head = about.whole("attention.value_length_mla") or head
    feed_forward = about.whole("feed_forward_length", 1 << 20) or 0
    experts = about.whole("expert_used_count", 1 << 12) or 0
    attended = heads * head
    dense = 3 * feed_forward + 2 * width
    row = dense
    if experts:
        each = about.whole("expert_feed_forward_length", 1 << 20) or feed_forward
        row = 3 * each * experts + 2 * width
        row += 0 if name in {"gpt-oss", "gptoss"} else width * experts
        if about.whole("leading_dense_block_count"):
            row = max(row, dense)
    lean = name in LEAN or layers.recurrent
    rest = 0 if lean else attended
    if name in PARALLEL_RESIDUAL:
        rest += width
    # With a quantised cache the result of attention is gone too, if it fits the place of an
    # embedding that has become free.
    quantised = 0 if rest == width and not experts else rest
    further = (about.whole("embedding_length_per_layer_input", 1 << 14) or 0) * len(layers.each)
    peaks = [0]
    rank = about.whole("attention.kv_lora_rank", 1 << 16)
    if rank:
        rope = about.whole("rope.dimension_count", 1 << 16) or 0
        key = about.whole("attention.key_length_mla", 1 << 16) or 0
        peaks.append(heads * (2 * (rank + rope) + key) + 3 * width)
    inner = about.whole("ssm.inner_size", 1 << 20) or 0
    if layers.recurrent and name not in DELTA_NETS:
        peaks.append(8 * inner)
    known = bool(width and (feed_forward or experts or layers.recurrent))
    return Graph(
        architecture=name,
        width=width,
        heads=heads,
        attended=attended,
        kv_width=max((layer.key for layer, _ in layers.counted), default=0),
        row=max(row + rest + further, *peaks) if known else 0,
        row_quantised=max(row + quantised + further, *peaks) if known else 0,
        layer_inputs=further,
        vocabulary=vocabulary,
        measured=name in MEASURED,
    )


def compute_bytes(
    graph: Graph, *, batch: int, cells: int, all_cells: int, flash: bool, quantised: bool, old: bool
) -> int:
    """
    Compute buffer of one GPU.

    Args:
        graph: the model's widths, which must be known.
        batch: tokens that pass through at once (``ub``).
        cells: of all caches that a token may look at.
        all_cells: of the cache for the whole context alone.
        flash: whether flash attention is on.
        quantised: whether the cache is.
        old: whether llama.cpp is of the first half of 2026 or before (Ollama 0.30.0): its mask
            is there at 32 and at 16 bits, and it makes room for the logits of a whole batch.
    """
    row = graph.row_quantised if quantised else graph.row
    if not flash:
        scores = graph.heads * all_cells + 2 * graph.width + 2 * graph.attended + 2 * graph.kv_width
        row = max(row, scores)
    needed = 4 * batch * row + mask_bytes(batch, cells, flash=flash, old=old)
    if old and graph.architecture not in ENCODERS:
        needed = max(needed, 4 * batch * (graph.vocabulary + graph.width))
    return needed


def mask_bytes(batch: int, cells: int, *, flash: bool, old: bool = False) -> int:
    """The attention mask: 16 bits with flash attention, 32 without."""
    return (6 if old and flash else 2 if flash else 4) * batch * cells


def pipeline_bytes(graph: Graph, *, batch: int, cells: int, flash: bool) -> tuple[int, int]:
    """
    What the first of several GPUs needs besides, and what each further one does.

    They work on four batches at once and keep copies of what goes in: of embeddings the first,
    of the layer before and its result each further one.
    """
    masks = 3 * mask_bytes(batch, cells, flash=flash)
    return masks + 16 * batch * (graph.width + graph.layer_inputs), masks + 32 * batch * graph.width
