"""Several simulated nodes on one thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hydra_llm.simulation.node import SimulatedNode
from hydra_llm.simulation.server import LoopThread

if TYPE_CHECKING:
    from typing_extensions import Self

    from hydra_llm.types import Node

__all__ = ["NodeGroup", "SimulatedCluster"]


class NodeGroup:
    """Simulated nodes by their ids. Raises ValueError if two have one."""

    def __init__(self, nodes: Iterable[SimulatedNode]) -> None:
        self.node_list = list(nodes)
        ids = [node.id for node in self.node_list]
        if len(set(ids)) != len(ids):
            raise ValueError(f"two nodes have one id: {', '.join(sorted(ids))}")

    def __getitem__(self, id: str) -> SimulatedNode:  # noqa: A002
        for node in self.node_list:
            if node.id == id:
                return node
        raise KeyError(id)

    def __iter__(self) -> Iterator[SimulatedNode]:
        return iter(self.node_list)

    def __len__(self) -> int:
        return len(self.node_list)

    def nodes(self, **overrides: Any) -> list[Node]:
        """Give the `hydra_llm.Node` of each."""
        return [node.node(**overrides) for node in self.node_list]


class SimulatedCluster(NodeGroup):
    """
    Several simulated nodes on one thread.

    ::

        with SimulatedCluster.demo(speed=100) as cluster:
            router = Router(cluster.nodes())
    """

    def __init__(self, nodes: Iterable[SimulatedNode]) -> None:
        super().__init__(nodes)
        self._thread: LoopThread | None = None

    @classmethod
    def demo(cls, *, speed: float = 1.0) -> SimulatedCluster:
        """Make three home machines: a workstation in use, a rack, and a gaming PC."""
        return cls(
            [
                SimulatedNode(
                    "workstation",
                    models=("llama3.2:3b", "qwen3:8b", "nomic-embed-text"),
                    vram_gb=8.0, used_vram_gb=6.5, ram_gb=32.0,
                    gpu_bandwidth_gb_s=270.0, cpu_bandwidth_gb_s=50.0, speed=speed,
                ),
                SimulatedNode(
                    "rack",
                    models=("llama3.2:3b", "qwen3:8b", "gemma3:12b", "mistral-small:24b",
                            "nomic-embed-text"),
                    vram_gb=24.0, used_vram_gb=4.0, ram_gb=128.0,
                    gpu_bandwidth_gb_s=930.0, cpu_bandwidth_gb_s=80.0, load_gb_s=3.0, speed=speed,
                ),
                SimulatedNode(
                    "gaming",
                    models=("llama3.2:3b", "qwen3:8b", "gemma3:12b"),
                    vram_gb=12.0, used_vram_gb=2.0, ram_gb=32.0,
                    gpu_bandwidth_gb_s=500.0, cpu_bandwidth_gb_s=60.0, speed=speed,
                ),
            ]
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<SimulatedCluster [{', '.join(node.id for node in self.node_list)}]>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def urls(self) -> list[str]:
        """Where the nodes listen."""
        return [node.url for node in self.node_list]

    def start(self) -> Self:
        """Start all nodes."""
        self._thread = self._new_thread()
        try:
            for node in self.node_list:
                node.start(self._thread)
        except BaseException:
            self.stop()
            raise
        return self

    def _new_thread(self) -> LoopThread:
        return LoopThread()

    def stop(self) -> None:
        """Stop all nodes."""
        for node in self.node_list:
            node.stop()
        if self._thread is not None:
            self._thread.close()
            self._thread = None
