"""A small cluster on real sockets, and a router that watches it closely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hydra_llm import HydraSettings, Router
from hydra_llm.testing import SimulatedCluster, SimulatedNode

MODEL = "llama3.2:3b"
SPEED = 200.0


def make_nodes(*ids: str, **about: Any) -> list[SimulatedNode]:
    """24 GB nodes of one kind, 200 times faster than life."""
    # Keep-alive counts in simulated seconds too: at this speed five minutes are soon over.
    given = {"models": (MODEL,), "vram_gb": 24.0, "speed": SPEED, "keep_alive_s": 1e9, **about}
    return [SimulatedNode(node_id, **given) for node_id in ids]


def make_router(cluster: SimulatedCluster, **settings: Any) -> Router:
    """A router that probes often and leaves the machine's own GPUs out of it."""
    nodes = settings.pop("nodes", None) or cluster.nodes()
    quick = {"health_check_interval": 0.2, "health_check_timeout": 1.0, "vram_monitoring": False}
    hooks = {name: settings.pop(name) for name in ("on_event", "on_decision") if name in settings}
    return Router(settings=HydraSettings(nodes=nodes, **{**quick, **settings}), **hooks)


@contextmanager
def preloaded(nodes: Iterable[SimulatedNode], *models: str) -> Iterator[SimulatedCluster]:
    """The nodes' cluster, with these models loaded on each."""
    with SimulatedCluster(nodes) as cluster:
        for node in cluster:
            for model in models:
                node.preload(model)
        yield cluster


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    """Three equal nodes a, b and c with the model loaded."""
    with preloaded(make_nodes("a", "b", "c"), MODEL) as cluster:
        yield cluster


@pytest.fixture
def router(cluster: SimulatedCluster) -> Iterator[Router]:
    """A router over the cluster; nothing may be left of it."""
    with make_router(cluster) as router:
        yield router
        assert router.in_flight == 0
        assert router.waiting == 0
