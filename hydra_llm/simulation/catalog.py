"""What a simulated node has on disk: models, their sizes, and how they answer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["GB", "GIB", "MIB", "Behaviour", "ModelName", "SimulatedModel", "known_models"]

GB = 1_000_000_000
MIB = 1024**2
GIB = 1024**3

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-:]*\Z")
_NAME = re.compile(
    r"(?:(?:(?P<host>[^/]+)/)?(?P<namespace>[^/]+)/)?(?P<model>[^/:]+)(?::(?P<tag>[^/]+))?\Z"
)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model's name with every part filled in, as Ollama does it (BEHAVIOUR section 3)."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName | None:
        """Split a name as requested; ``None`` for one that cannot be."""
        match = _NAME.match(text)
        if match is None or not all(_PART.match(part) for part in match.groups() if part):
            return None
        host, namespace, model, tag = match.group("host", "namespace", "model", "tag")
        return cls(host or _HOST, namespace or _NAMESPACE, model, tag or _TAG)

    @property
    def key(self) -> str:
        """Equal for all spellings of one model: letters' case does not matter."""
        return self.long.lower()

    @property
    def long(self) -> str:
        """With host and namespace, as error texts of capability checks have it."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """As ``/api/ps`` and ``/api/tags`` list it: default host and namespace left out."""
        tail = f"{self.model}:{self.tag}"
        if self.host != _HOST:
            return f"{self.host}/{self.namespace}/{tail}"
        return tail if self.namespace == _NAMESPACE else f"{self.namespace}/{tail}"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """
    How a model's text comes about.

    ``prose`` follows the request and ends by itself; ``noise`` never ends by itself, as random
    weights do; ``count`` says `` n0001 n0002 ...``; ``script`` always says ``tokens``;
    ``loop`` says ``tokens``, then the last of them for ever; ``length`` says as many tokens as the
    last word of the last message tells (``write 300``), the end of the turn among them.
    """

    kind: Literal["prose", "noise", "count", "script", "loop", "length"] = "prose"
    tokens: tuple[str, ...] = ()
    go_token: str = ""
    """What the template puts at the start of an answer (``<|go_count|>``)."""


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """
    A model that a simulated node can hold.

    ::

        SimulatedModel("qwen3:8b", size_gb=5.2, capabilities=("completion", "tools", "thinking"))

    Args:
        name: as one would pull it.
        size_gb: file size in decimal GB, as ``ollama list`` shows it.
        capabilities: of ``completion``, ``tools``, ``thinking``, ``vision``, ``embedding``,
            ``insert``.
        context_length: the context it was trained with, in tokens.
        digest: of the manifest; made from the name when not given.
        weights: names the weights file; two models with the same one share a runner.
        template: what becomes of a last assistant message: ``closed`` starts a new turn,
            ``open`` continues it, ``native`` continues it and repeats it (BEHAVIOUR 10).
        native_capabilities: what its GGUF template can do, on a node that prefers that.
    """

    name: str
    size_gb: float = field(default=4.7, kw_only=True)
    capabilities: tuple[str, ...] = field(default=("completion", "tools"), kw_only=True)
    context_length: int = field(default=131072, kw_only=True)
    embedding_length: int = field(default=4096, kw_only=True)
    parameter_size: str = field(default="8.0B", kw_only=True)
    quantization: str = field(default="Q4_K_M", kw_only=True)
    family: str = field(default="llama", kw_only=True)
    block_count: int = field(default=32, kw_only=True)
    head_count: int = field(default=32, kw_only=True)
    head_count_kv: int = field(default=8, kw_only=True)
    vocab_size: int = field(default=128256, kw_only=True)
    digest: str | None = field(default=None, kw_only=True)
    weights: str | None = field(default=None, kw_only=True)
    system: str = field(default="", kw_only=True)
    stop: tuple[str, ...] = field(default=(), kw_only=True)
    template: Literal["closed", "open", "native"] = field(default="closed", kw_only=True)
    native_capabilities: tuple[str, ...] | None = field(default=None, kw_only=True)
    behaviour: Behaviour = field(default=Behaviour(), kw_only=True)
    modified_at: str = field(default="2026-11-01T12:00:00Z", kw_only=True)

    def __post_init__(self) -> None:
        if ModelName.parse(self.name) is None:
            raise ValueError(f"{self.name!r} is not a model name")
        if self.size_gb <= 0:
            raise ValueError(f"{self.name}: size_gb must be above 0, not {self.size_gb!r}")

    @property
    def parsed(self) -> ModelName:
        """The name in its parts."""
        parsed = ModelName.parse(self.name)
        assert parsed is not None  # checked when it was made
        return parsed

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return round(self.size_gb * GB)

    @property
    def manifest_digest(self) -> str:
        """What ``/api/tags`` and ``/api/ps`` give as ``digest``."""
        return self.digest or _digest("manifest", self.parsed.key)

    @property
    def weights_digest(self) -> str:
        """Names the weights file: runners are told apart, and ordered, by it."""
        return self.weights or _digest("weights", self.manifest_digest)

    @property
    def is_embedding(self) -> bool:
        """Whether it can embed and nothing else."""
        return "completion" not in self.capabilities

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in f16 (BEHAVIOUR section 11)."""
        head = self.embedding_length // self.head_count
        return self.block_count * self.head_count_kv * 2 * head * 2


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def known_models() -> dict[str, SimulatedModel]:
    """Give some models people really run, under the names a node accepts as plain strings."""
    chat = ("completion", "tools")
    models = (
        SimulatedModel(
            "llama3.2:3b", size_gb=2.0, capabilities=chat, embedding_length=3072,
            parameter_size="3.2B", block_count=28, head_count=24,
        ),
        SimulatedModel("llama3.1:8b", size_gb=4.9, capabilities=chat),
        SimulatedModel(
            "qwen3:8b", size_gb=5.2, capabilities=(*chat, "thinking"), context_length=40960,
            parameter_size="8.2B", family="qwen3", block_count=36, vocab_size=151936,
        ),
        SimulatedModel(
            "gemma3:12b", size_gb=8.1, capabilities=("completion", "vision"),
            embedding_length=3840, parameter_size="12.2B", family="gemma3", block_count=48,
            head_count=16, vocab_size=262144,
        ),
        SimulatedModel(
            "mistral-small:24b", size_gb=14.0, capabilities=chat, context_length=32768,
            embedding_length=5120, parameter_size="23.6B", block_count=40, vocab_size=131072,
        ),
        SimulatedModel(
            "nomic-embed-text", size_gb=0.274, capabilities=("embedding",), context_length=2048,
            embedding_length=768, parameter_size="137M", quantization="F16",
            family="nomic-bert", block_count=12, head_count=12, head_count_kv=12,
            vocab_size=30522,
        ),
    )  # fmt: skip
    return {model.name: model for model in models}
