"""When Ollama loads a model, and with how much context if nobody says (``server/sched.go``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hydra_llm.vram.accounting import era_of, numbers_of
from hydra_llm.vram.cards import GB, GIB

__all__ = [
    "DEFAULT_KEEP_ALIVE_SECONDS",
    "FIRST_MODEL_MARGIN_BYTES",
    "FURTHER_MODEL_SHARE",
    "LEAST_CONTEXT",
    "MODELS_PER_GPU",
    "LoadingRule",
    "context_by_memory",
    "default_context",
    "loading_rule",
]

FIRST_MODEL_MARGIN_BYTES = GIB
"""What llama.cpp's ``--fit`` leaves free per device (Ollama >= 0.30)."""

FURTHER_MODEL_SHARE = 0.8
"""Ollama >= 0.30 loads a further model only into 80 % of what is free."""

MODELS_PER_GPU = 3
"""``OLLAMA_MAX_LOADED_MODELS`` by default, per GPU."""

DEFAULT_KEEP_ALIVE_SECONDS = 300.0
"""``OLLAMA_KEEP_ALIVE`` by default, for models of which nothing has shown it."""

LEAST_CONTEXT = 4096
"""Tokens that Ollama takes by itself where there is least memory, since 0.6.7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingRule:
    """How one version of Ollama decides whether a model has room."""

    share: float
    """Of what is free, what a further model may be expected to take."""
    margin_bytes: int
    """What is left free on each GPU beside a model that is alone."""


@lru_cache(maxsize=64)
def loading_rule(version: str | None) -> LoadingRule:
    """That of a version of Ollama; of the newest if None."""
    if era_of(version) == "llama_server":
        return LoadingRule(share=FURTHER_MODEL_SHARE, margin_bytes=FIRST_MODEL_MARGIN_BYTES)
    return LoadingRule(share=1.0, margin_bytes=0)


def default_context(total_vram_bytes: int | None, version: str | None = None) -> int:
    """
    ``num_ctx`` that Ollama takes by itself: by total VRAM since 0.15.5 (BEHAVIOUR section 6).

    Args:
        total_vram_bytes: of all GPUs; None: unknown, and little is taken.
        version: of Ollama; the newest if None.
    """
    numbers = numbers_of(version)
    if numbers is not None and numbers < (0, 15, 5):
        return LEAST_CONTEXT if numbers >= (0, 6, 7) else 2048
    if total_vram_bytes is None or total_vram_bytes < 23 * GIB:
        return LEAST_CONTEXT
    return 32_768 if total_vram_bytes < 47 * GIB else 262_144


def context_by_memory(total_vram_bytes: int | None, source: str | None, version: str | None) -> int:
    """
    As :func:`default_context`, of a total that some source has told.

    A card sold as 24 GB has 24 GiB: who configures 24 means that card.
    """
    if total_vram_bytes is not None and (source or "").startswith("config"):
        total_vram_bytes = total_vram_bytes * GIB // GB
    return default_context(total_vram_bytes, version)
