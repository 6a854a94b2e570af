"""LiteLLM with our provider, over a small cluster whose models see, think, call tools and embed."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the internet

from collections.abc import Iterator
from typing import Any

import litellm as typed_litellm
import pytest

from hydra_llm import Router
from hydra_llm.integrations.litellm import register_provider
from hydra_llm.testing import SimulatedCluster, SimulatedModel
from tests.router.conftest import make_nodes, preloaded, router

__all__ = ["router"]  # the fixture, over the cluster of this folder

litellm: Any = typed_litellm
"""Its types differ between the versions, and from what its functions take and return."""

CHAT = "qwen3-vl:8b"
PLAIN = "llama3.2:3b"
EMBEDDING = "nomic-embed-text"
ABLE = SimulatedModel(
    CHAT, size_gb=6.1, capabilities=("completion", "tools", "thinking", "vision"), family="qwen3vl"
)
MODELS = (ABLE, PLAIN, EMBEDDING)
NAMES = (CHAT, PLAIN, EMBEDDING)


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """Two equal nodes a and b with every model loaded."""
    with preloaded(make_nodes("a", "b", models=MODELS, speed=500.0), *NAMES) as cluster:
        yield cluster


@pytest.fixture
def provider(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM knows `hydra/` as the router over the cluster, for this test alone."""
    monkeypatch.setattr(litellm, "custom_provider_map", [])
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    register_provider(router)
