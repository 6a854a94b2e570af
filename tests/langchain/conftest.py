"""A small cluster whose models see, think, call tools and embed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hydra_llm.testing import SimulatedCluster, SimulatedModel, SimulatedNode
from tests.router.conftest import preloaded, router

__all__ = ["router"]  # the fixture, over the cluster of this folder

CHAT = "qwen3-vl:8b"
OTHER = "llama3.2:3b"
EMBEDDING = "nomic-embed-text"
SPEED = 500.0

ABLE = SimulatedModel(
    CHAT, size_gb=6.1, capabilities=("completion", "tools", "thinking", "vision"), family="qwen3vl"
)


def make_nodes(*ids: str, **about: Any) -> list[SimulatedNode]:
    """24 GB nodes of one kind that never unload anything for being idle."""
    given = {"models": (ABLE, OTHER, EMBEDDING), "speed": SPEED, "keep_alive_s": 1e9, **about}
    return [SimulatedNode(node_id, **given) for node_id in ids]


def make_cluster(*ids: str, **about: Any) -> SimulatedCluster:
    return SimulatedCluster(make_nodes(*ids, **about))


@contextmanager
def loaded_cluster() -> Iterator[SimulatedCluster]:
    """Three equal nodes a, b and c with every model loaded."""
    with preloaded(make_nodes("a", "b", "c"), CHAT, OTHER, EMBEDDING) as cluster:
        yield cluster


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with loaded_cluster() as cluster:
        yield cluster
