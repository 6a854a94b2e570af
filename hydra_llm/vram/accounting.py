"""How Ollama itself reckoned memory before it read the runner's log.

Up to 0.11.10 ``size`` in ``/api/ps`` is a forecast (``llm/memory.go``); from 0.11.11 to 0.24 it
is a layout of the same figures (``llm/server.go``); both take the compute graph from
``GraphSize`` (``fs/ggml/ggml.go``). From 0.30 on it is what llama-server's log says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hydra_llm.vram.metadata import Metadata

__all__ = [
    "OLLAMA_ENGINE",
    "Era",
    "OldFigures",
    "era_of",
    "has_old_graph",
    "numbers_of",
    "old_graph_bytes",
    "old_kv_bytes",
    "read_old_figures",
]

Era = Literal["legacy", "engine", "llama_server"]
"""Whose figures are meant: up to 0.11.10, up to 0.24, from 0.30 on."""

OLLAMA_ENGINE = frozenset(
    "bert deepseek2 deepseekocr gemma3 gemma3n gemma4 gptoss gpt-oss laguna llama4 mistral3 "
    "mllama nemotron_h nemotron_h_moe nemotron_h_omni nomic-bert olmo3 qwen25vl qwen3 qwen3moe "
    "qwen35 qwen35moe qwen3next qwen3vl qwen3vlmoe glm4moelite glmocr lfm2 lfm2moe".split()
)
"""Architectures that 0.11.11 to 0.24 ran in Ollama's own engine (``OllamaEngineRequired``)."""

MIB = 1 << 20
_GEMMA3_PERIOD = 6
_GPT_OSS_WINDOW = 4096
_KV_BYTES = {"f32": 4.0, "q8_0": 1.0, "q4_0": 0.5}


def era_of(ollama_version: str | None) -> Era:
    """The accounting of a version; that of the newest for one that is not told."""
    version = numbers_of(ollama_version)
    if version is None or version >= (0, 30, 0):
        return "llama_server"
    return "engine" if version > (0, 11, 10) else "legacy"


def has_old_graph(ollama_version: str | None) -> bool:
    """Whether the version's llama.cpp plans the larger graphs of early 2026 (0.30.0)."""
    version = numbers_of(ollama_version)
    return version is not None and version <= (0, 30, 0)


def numbers_of(version: str | None) -> tuple[int, int, int] | None:
    """A version of Ollama, to compare; None where it tells nothing."""
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", version or "")
    if found is None:
        return None
    numbers = int(found[1]), int(found[2]), int(found[3] or 0)
    return None if numbers == (0, 0, 0) else numbers  # 0.0.0 is a build of one's own


@dataclass(frozen=True, slots=True)
class OldFigures:
    """What those formulas take of a model."""

    architecture: str = ""
    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    fewest_kv_heads: int = 0
    key: int = 0
    value: int = 0
    vocabulary: int = 0
    window: int = 0
    layers: int = 0

    @property
    def known(self) -> bool:
        """Whether there is enough for them."""
        return bool(self.width and self.heads and self.layers)


def read_old_figures(about: Metadata, layers: int, vocabulary: int) -> OldFigures:
    """The figures, each 0 where it is not told."""
    width = about.whole("embedding_length", 1 << 20) or 0
    heads = about.whole("attention.head_count", 1 << 14) or 0
    head = width // heads if heads else 0
    each = about.per_layer("attention.head_count_kv", layers) or ()
    most = about.whole("attention.head_count_kv", 1 << 14) or heads
    return OldFigures(
        architecture=about.architecture,
        width=width,
        heads=heads,
        kv_heads=most,
        fewest_kv_heads=min(each, default=most) or 1,
        key=about.whole("attention.key_length", 1 << 16) or head,
        value=about.whole("attention.value_length", 1 << 16) or head,
        vocabulary=vocabulary,
        window=about.whole("attention.sliding_window") or 0,
        layers=layers,
    )


def old_kv_bytes(
    model: OldFigures, *, num_ctx: int, slots: int, batch: int, kv_type: str
) -> list[int]:
    """Key/value cache of each layer, as Ollama <= 0.24 forecast it."""
    context = num_ctx * slots
    a_token = (model.key + model.value) * model.kv_heads * _KV_BYTES.get(kv_type, 2.0)
    cells = [context] * model.layers
    if model.architecture == "gemma3":
        short = slots * model.window + batch
        cells = [context if (i + 1) % _GEMMA3_PERIOD == 0 else short for i in range(model.layers)]
    elif model.architecture in {"gptoss", "gpt-oss"}:
        short = slots * _GPT_OSS_WINDOW + batch
        cells = [context if i % 2 else short for i in range(model.layers)]
    return [int(one * a_token) for one in cells]


def old_graph_bytes(
    model: OldFigures, kv_bytes: int, *, num_ctx: int, slots: int, batch: int, flash: bool
) -> int:
    """Compute graph with all layers on the GPU, as Ollama <= 0.24 forecast it."""
    context = num_ctx * slots
    width, heads, vocabulary = model.width, model.heads, model.vocabulary
    scores = context * (1 + heads)
    logits = 4 * batch * (width + vocabulary)
    match model.architecture:
        case "llama" | "llama4" | "phi2":
            graph = 4 * batch * (1 + 4 * width + scores)
        case "qwen2":
            graph = 4 * batch * (1 + 2 * width + scores)
        case "command-r":
            graph = 4 * batch * (2 + 4 * width + scores)
        case "gemma" | "gemma2" | "gemma3" | "gemma3n":
            graph = 4 * batch * (2 + scores + 2 * width + 2 * model.key * heads)
        case "deepseek2":
            logits = 4 * batch * (3 * width + vocabulary)
            latent = context * (1 + model.kv_heads) + 2 * model.key * model.kv_heads
            graph = 4 * batch * (2 + 3 * width + latent)
        case "stablelm":
            graph, logits = 4 * batch * (2 + 3 * width + scores), 0
        case "gptoss" | "gpt-oss" if flash:
            graph, logits = (4 * slots + (context >> 10) + 110) * MIB, 0
        case "gptoss" | "gpt-oss":
            graph, logits = 2 * heads // model.fewest_kv_heads * kv_bytes // 6, 0
        case _:
            graph, logits = heads // model.fewest_kv_heads * kv_bytes // 6, 0
    graph = max(graph, logits)
    return graph * 4 if model.architecture == "gemma3n" else graph
