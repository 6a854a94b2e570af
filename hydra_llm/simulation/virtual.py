"""Simulated nodes, and whatever talks to them, in virtual time: a day passes in a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from hydra_llm.simulation.cluster import NodeGroup
from hydra_llm.simulation.node import SimulatedNode
from hydra_llm.simulation.virtual_loop import VirtualLoop
from hydra_llm.simulation.virtual_network import (
    VirtualNetwork,
    VirtualPort,
    VirtualTransport,
    Way,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from hydra_llm.types import Node

__all__ = ["VirtualCluster"]

_T = TypeVar("_T")
_BEGINNING = 1_790_000_000.0
"""When virtual time begins, in seconds since 1970: some day, always the same."""
_LAST_TURNS = 100


class VirtualCluster(NodeGroup):
    """
    Several simulated nodes and their clients on one event loop, in virtual time.

    ::

        with VirtualCluster([SimulatedNode("a"), SimulatedNode("b")]) as world:
            router = Router(world.nodes(), world=world)

            async def work():
                async with AsyncClient(router=router) as client:
                    await client.chat("llama3.2:3b", messages=[...])
                    await asyncio.sleep(3600)  # at once

            world.run(work())
            print(world.now)

    The router, its probes, the nodes' scheduling and HTTP are the real ones; sockets, threads
    and waiting are not. What happens depends on nothing but the seeds given, so a run can be
    repeated: give the router a ``random_seed`` too.

    Args:
        nodes: with ``speed=1``, as there is no need to hurry.
        round_trip_s: what connecting to a node takes.
    """

    def __init__(self, nodes: Iterable[SimulatedNode], *, round_trip_s: float = 0.0002) -> None:
        super().__init__(nodes)
        self.loop = VirtualLoop()
        self._network = VirtualNetwork(self.loop, round_trip_s=round_trip_s)
        self.transport: httpx.AsyncBaseTransport = VirtualTransport(self._network)

    def __repr__(self) -> str:
        names = ", ".join(node.id for node in self.node_list)
        return f"<VirtualCluster [{names}] at {self.now:.3f} s>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start all nodes."""
        stage = _Stage(self.loop, self._network)
        try:
            for node in self.node_list:
                node.start(stage)
        except BaseException:
            self.close()
            raise
        return self

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Have something done, and give what it returns; what else goes on stops with it."""
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        """End whatever still runs, the nodes, and the loop."""
        if self.loop.is_closed():
            return
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        if left:
            self.run(_gathered(left))
        for node in self.node_list:
            node.stop()
        self.run(self.loop.shutdown_asyncgens())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> float:
        """Virtual seconds since the beginning."""
        return self.loop.time()

    def clock(self) -> float:
        """Virtual seconds since the beginning."""
        return self.loop.time()

    def wall_clock(self) -> float:
        """Virtual seconds since 1970."""
        return _BEGINNING + self.loop.time()

    # ------------------------------------------------------------------ the network

    def nodes(self, **overrides: Any) -> list[Node]:
        """Give the `hydra_llm.Node` of each; none of them is this machine."""
        return super().nodes(**({"local": False} | overrides))

    def set_way(self, id: str, way: Way) -> None:  # noqa: A002
        """
        Break or mend the way to a node; connections that are there stay.

        Args:
            id: of the node.
            way: ``open``, ``no route`` or ``unknown host``.
        """
        node = self[id]
        self._network.set_way(node.host, node.port, way)


class _Stage:
    """Where the nodes live; see `hydra_llm.simulation.stage.Stage`."""

    def __init__(self, loop: VirtualLoop, network: VirtualNetwork) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self._network = network
        self._tasks: set[asyncio.Task[None]] = set()

    def clock(self) -> float:
        return self.loop.time()

    def wall_clock(self) -> float:
        return _BEGINNING + self.loop.time()

    def port(self, host: str, number: int) -> VirtualPort:
        return self._network.port(host, number)

    def call(self, function: Callable[[], _T]) -> _T:
        return function()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Let the loop take some turns; from within it, it takes them later by itself."""
        for _ in range(0 if self.loop.is_running() else _LAST_TURNS):
            if condition():
                return
            self.loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        """Leave the loop to the cluster."""


async def _gathered(tasks: Iterable[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
