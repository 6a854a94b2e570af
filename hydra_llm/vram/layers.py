"""The key/value cache and the recurrent state, layer by layer.

What a layer keeps is decided by its kind (llama.cpp's ``llama-kv-cache``,
``llama-kv-cache-iswa``, ``llama-memory-hybrid`` and ``llama-hparams``):

- full attention: keys and values of every token of the context;
- a sliding window: of as many tokens as the window and one batch hold;
- latent attention (MLA): one compressed row a token, keys only;
- recurrent and short convolution: a state of fixed size, always 32 bits wide;
- layers that use another's cache, next-n blocks, encoders: nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hydra_llm.vram.metadata import MOST, Metadata
from hydra_llm.vram.tensors import BlockTensors, TensorTable

__all__ = ["ENCODERS", "KV_BYTES", "Layer", "Layers", "read_layers"]

KV_BYTES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}
"""Bytes of that many elements of the cache, by ``OLLAMA_KV_CACHE_TYPE``."""

ENCODERS = frozenset(
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 neo-bert modern-bert eurobert "
    "gemma-embedding t5encoder".split()
)
"""They see the whole text at once and keep nothing (llama.cpp's ``create_memory``)."""

WINDOW_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gemma4": 6,
    "gptoss": 2,
    "gpt-oss": 2,
    "cohere2": 4,
    "olmo2": 4,
    "olmo3": 4,
    "exaone4": 4,
    "afmoe": 4,
    "llama4": 4,
}
"""Of so many layers the last one sees the whole context (``set_swa_pattern``)."""

WINDOWS = {"gemma2": 4096, "llama4": 8192, "exaone4": 4096}
"""The window where the file names none (``llama-model.cpp``)."""

WINDOWLESS = frozenset("llama phi3 qwen2 qwen2moe qwen3 qwen3moe mistral3".split())
"""Their files may name a window, which llama.cpp does not use."""

RECURRENT = frozenset("mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7".split())
BOTH = frozenset({"falcon-h1"})
"""Every layer has attention and a state."""

DELTA_NETS = frozenset("qwen3next qwen35 qwen35moe".split())

SHORT_CONVOLUTIONS = {"lfm2": 3, "lfm2moe": 3}
"""Tokens a convolution looks at (``shortconv.l_cache``), in every published model."""

GEMMA3N_OWN_LAYERS = 20
"""Gemma 3n's layers from here on use the cache of earlier ones (``n_layer_kv_from_start``)."""

USUAL_KV_WIDTH = 1024
"""Width of keys, and of values, of a layer in most models of 3 to 70 B: 8 heads of 128."""


WIDEST = 16
"""No layer's keys are wider than this many times the embedding; DeepSeek's are 3.4 times."""


class Layer(NamedTuple):
    """What one layer keeps."""

    sees: Literal["all", "window", "nothing"] = "nothing"
    key: int = 0
    """Elements a token."""
    value: int = 0
    state: int = 0
    """32-bit elements a slot, whatever the context."""


@dataclass(frozen=True, slots=True)
class Layers:
    """
    All layers of a model, and how sure that is.

    ``least`` and ``most`` are what they may be instead, where ``/api/show`` leaves it open.
    """

    each: tuple[Layer, ...]
    window: int = 0
    least: tuple[Layer, ...] | None = None
    most: tuple[Layer, ...] | None = None
    source: str = ""
    counted: tuple[tuple[Layer, int], ...] = ()
    """Equal layers and how many there are of them."""

    @classmethod
    def of(
        cls,
        each: Sequence[Layer],
        *,
        window: int = 0,
        least: Sequence[Layer] | None = None,
        most: Sequence[Layer] | None = None,
        source: str,
    ) -> Layers:
        """Put together, with equal layers counted."""
        return cls(
            tuple(each),
            window,
            None if least is None else tuple(least),
            None if most is None else tuple(most),
            source,
            tuple(Counter(each).items()),
        )

    @property
    def widest_value(self) -> int:
        """The widest values of a layer: without flash attention all are stored as wide."""
        return max((layer.value for layer, _ in self.counted), default=0)

    @property
    def attention(self) -> int:
        """How many layers keep keys."""
        return sum(n for layer, n in self.counted if layer.sees != "nothing")

    @property
    def windowed(self) -> bool:
        """Whether some layers look back over a window only."""
        return any(layer.sees == "window" for layer, _ in self.counted)

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state."""
        return any(layer.state for layer, _ in self.counted)


UNKNOWN = Layers.of(
    [Layer("all", 32_768, 32_768)],
    least=[Layer("all", 2_048, 2_048)],
    most=[Layer("all", 131_072, 131_072)],
    source="cache of an 8B Llama: nothing tells of the layers",
)
"""128 KiB a token at 16 bits, from 8 KiB to 512 KiB (Llama 2 7B): all layers as if one."""


def read_layers(about: Metadata, table: TensorTable | None) -> Layers:
    """What each layer keeps, from the metadata and the shapes in the tensor table."""
    count = about.whole("block_count", 4096) or (len(table.blocks) if table else 0)
    if not count:
        return UNKNOWN
    if about.architecture in ENCODERS or about.get("attention.causal") is False:
        return Layers.of([Layer()] * count, source="an encoder keeps nothing")
    if table is not None and len(table.blocks) < count:
        table = None
    return _Reader(about, table, count).layers()


class _Reader:
    """Reads one model's layers."""

    def __init__(self, about: Metadata, table: TensorTable | None, count: int) -> None:
        self.about = about
        self.blocks: list[BlockTensors] | None = table.blocks if table else None
        self.count = count
        heads = about.whole("attention.head_count")
        width = about.whole("embedding_length")
        head = width // heads if heads and width else None
        self.heads = heads
        self.key = about.whole("attention.key_length") or head
        self.value = about.whole("attention.value_length") or head
        self.window_key = about.whole("attention.key_length_swa") or self.key
        self.window_value = about.whole("attention.value_length_swa") or self.value
        self.kv_heads = about.per_layer("attention.head_count_kv", count)
        if self.kv_heads is None and "attention.head_count_kv" not in about and heads:
            self.kv_heads = (heads,) * count
        self.window = about.whole("attention.sliding_window") or WINDOWS.get(about.architecture, 0)
        usual = SHORT_CONVOLUTIONS.get(about.architecture, 0)
        self.convolution = about.whole("shortconv.l_cache", 1 << 10) or usual
        self.sure = True

    def layers(self) -> Layers:
        windowed = self._windowed()
        keeps = self._own_caches()
        each = [self._layer(i, windowed[i]) if keeps[i] else Layer() for i in range(self.count)]
        least = most = None
        if self.window and not any(windowed) and self.about.architecture not in WINDOWLESS:
            least = [one._replace(sees="window") if one.sees == "all" else one for one in each]
        if not self.sure:
            heads = self.heads or 1
            head = self.key or USUAL_KV_WIDTH // 8
            small, large = head, max(head * heads, USUAL_KV_WIDTH)
            least = [_as_wide(one, small) for one in least or each]
            most = [_as_wide(one, large)._replace(state=0) for one in each]
        return Layers.of(each, window=self.window, least=least, most=most, source=self._source())

    def _source(self) -> str:
        if not self.sure:
            return "usual width of keys and values: their heads are an array, and null"
        return "tensor shapes" if self.blocks else "model_info"

    def _windowed(self) -> tuple[bool, ...]:
        """Which layers look back over a window only."""
        nowhere = (False,) * self.count
        if not self.window:
            return nowhere
        told = self.about.flags("attention.sliding_window_pattern", self.count)
        if told is not None:
            return told
        architecture = self.about.architecture
        # Of EXAONE 4 only the 32B has windows.
        if architecture == "exaone4" and self.count != 64:
            return nowhere
        period = self.about.whole("attention.sliding_window_pattern", 64)
        period = period or WINDOW_PERIODS.get(architecture)
        if not period or architecture in WINDOWLESS:
            return nowhere
        return tuple((i + 1) % period != 0 for i in range(self.count))

    def _own_caches(self) -> list[bool]:
        """Which layers keep something of their own."""
        shared = self.about.whole("attention.shared_kv_layers") or 0
        if self.about.architecture == "gemma3n" and not shared:
            shared = max(0, self.count - GEMMA3N_OWN_LAYERS)
        own = self.count - min(self.count, shared)
        next_n = self.about.whole("nextn_predict_layers", 64) or 0
        own = min(own, max(1, self.count - next_n))
        return [i < own and not (self.blocks and self.blocks[i].next_n) for i in range(self.count)]

    def _layer(self, i: int, windowed: bool) -> Layer:
        state = self._state(i)
        if state and self.about.architecture not in BOTH:
            return Layer(state=state)
        key, value = self._widths(i, windowed)
        if not key:
            return Layer(state=state)
        return Layer("window" if windowed else "all", key, value, state)

    def _widths(self, i: int, windowed: bool) -> tuple[int, int]:
        """Elements of a layer's keys and values a token."""
        rank = self.about.whole("attention.kv_lora_rank")
        # Older conversions of DeepSeek keep full keys and values, and have no *_mla keys.
        if rank and (
            "attention.key_length_mla" in self.about or self.kv_heads == (1,) * self.count
        ):
            rope = self.about.whole("rope.dimension_count")
            return (rank + rope if rope else self.key or rank), 0
        if self.blocks is not None:
            block = self.blocks[i]
            if block.key:
                # Gemma 4's full layers use their keys as values, and store both.
                return block.key, block.value or block.key
            if not (block.fused or block.latent):
                return 0, 0
        key = self.window_key if windowed else self.key
        value = self.window_value if windowed else self.value
        if self.kv_heads is not None and key and value:
            most = WIDEST * (self.about.whole("embedding_length") or MOST // WIDEST)
            if self.kv_heads[i] * max(key, value) <= most:
                return self.kv_heads[i] * key, self.kv_heads[i] * value
        self.sure = False
        return USUAL_KV_WIDTH, USUAL_KV_WIDTH

    @property
    def _may_be_recurrent(self) -> bool:
        return self.convolution > 0 or "ssm.inner_size" in self.about

    def _state(self, i: int) -> int:
        """32-bit elements of a layer's state; 0 for a layer without one."""
        if not self._is_recurrent(i):
            return 0
        about = self.about
        width = about.whole("embedding_length") or 0
        head = about.whole("wkv.head_size")
        if head:
            return (about.whole("token_shift_count") or 2) * width + width * head
        if self.convolution:
            return (self.convolution - 1) * width
        inner = about.whole("ssm.inner_size") or 0
        state = about.whole("ssm.state_size") or 0
        groups = about.whole("ssm.group_count") or 0
        kernel = about.whole("ssm.conv_kernel") or 1
        return (kernel - 1) * (inner + 2 * groups * state) + state * inner

    def _is_recurrent(self, i: int) -> bool:
        architecture = self.about.architecture
        if architecture in RECURRENT or architecture in BOTH:
            return True
        if self.blocks is not None:
            return self.blocks[i].recurrent or self.blocks[i].short_convolution
        interval = self.about.whole("full_attention_interval", 4096)
        if interval is None and architecture in DELTA_NETS:
            interval = 4
        if interval:
            return (i + 1) % interval != 0
        if not self._may_be_recurrent or self.kv_heads is None or self.kv_heads[i]:
            return False
        # Nemotron-H has layers of a feed-forward network alone.
        ff = self.about.per_layer("feed_forward_length", self.count)
        alone = isinstance(self.about.get("feed_forward_length"), list)
        return not (alone and ff is not None and ff[i])


def _as_wide(layer: Layer, width: int) -> Layer:
    return layer if layer.sees == "nothing" else layer._replace(key=width, value=width)
