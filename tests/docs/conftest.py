"""Machines called rig, gaming and workstation, as the pages name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hydra_llm.testing import HostNames, SimulatedCluster, SimulatedNode

MODELS = ("llama3.2:3b", "qwen3:8b", "nomic-embed-text")
SPEED = 50.0


@pytest.fixture
def machines() -> Iterator[SimulatedCluster]:
    """Three equal nodes; the pages' smallest model is loaded on each."""
    nodes = [SimulatedNode(name, models=MODELS, speed=SPEED) for name in ("rig", "gaming")]
    with SimulatedCluster([*nodes, SimulatedNode("workstation", models=MODELS, speed=SPEED)]) as c:
        for node in c:
            node.preload("llama3.2:3b")
            # A server bound to loopback would refuse to be called by a name, as Ollama does.
            node.host = node.id
        yield c


@pytest.fixture
def found_by_name(machines: SimulatedCluster) -> Iterator[Callable[[str], str]]:
    """
    Have ``http://rig:11434`` lead to the simulated rig.

    The name is resolved to this machine, and the returned function puts the port at which the
    node listens where a page says 11434. Nothing else of a page is changed.
    """

    def with_ports(text: str) -> str:
        for node in machines:
            text = text.replace(f"http://{node.id}:11434", f"http://{node.id}:{node.port}")
        return text

    with HostNames({node.id: "127.0.0.1" for node in machines}):
        yield with_ports
