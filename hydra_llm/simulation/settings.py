"""What a simulated node is made of and how its Ollama is set up."""

from __future__ import annotations

from dataclasses import dataclass

from hydra_llm.simulation.catalog import GB, GIB

__all__ = ["Gpu", "NodeSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: what it has, and what programs other than Ollama hold of it."""

    total_bytes: int
    used_by_others_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """
    Hardware, version and environment variables of one Ollama server.

    Bandwidths are in bytes a second. Without ``gpus`` the node computes on its CPU.
    """

    version: str = "0.32.15"
    gpus: tuple[Gpu, ...] = ()
    ram_bytes: int = 64 * GB
    num_parallel: int = 1
    max_loaded_models: int | None = None
    max_queue: int = 512
    keep_alive_s: float = 300.0
    default_num_ctx: int | None = None
    gpu_bandwidth: float = 400.0 * GB
    cpu_bandwidth: float = 40.0 * GB
    prefill_ratio: float = 30.0
    load_bandwidth: float = 2.0 * GB
    load_fixed_s: float = 0.5
    vram_recovery_s: float = 0.5
    """How long the scheduler waits for VRAM to come back after it unloaded a runner."""
    go_template: bool = True
    token_output: int = 64
    tokens_per_part: int = 1
    """Tokens in each part of a stream after the first: more of them are less work to simulate."""
    seed: int = 0

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(int(part) for part in self.version.split("-")[0].split("."))

    @property
    def is_modern(self) -> bool:
        """Whether the runner is a separate ``llama-server``: 0.30 and later."""
        return self.release >= (0, 30)

    @property
    def loaded_limit(self) -> int:
        """``OLLAMA_MAX_LOADED_MODELS``; by default three for each GPU."""
        return self.max_loaded_models or 3 * max(1, len(self.gpus))

    def automatic_num_ctx(self, train_context: int) -> int:
        """Give the context of a request that names none: by total VRAM (BEHAVIOUR section 6)."""
        if self.default_num_ctx is not None:
            return min(self.default_num_ctx, train_context)
        total = sum(gpu.total_bytes for gpu in self.gpus)
        tier = 262144 if total >= 47 * GIB else 32768 if total >= 23 * GIB else 4096
        return min(tier, train_context)
