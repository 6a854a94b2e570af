"""Where the nodes of a run have real sockets, and time passes faster than in life."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from hydra_llm.pools import Pools
from hydra_llm.simulation.cluster import SimulatedCluster
from hydra_llm.simulation.fast_loop import FastClock, FastLoop
from hydra_llm.simulation.node import SimulatedNode
from hydra_llm.simulation.server import LoopThread

if TYPE_CHECKING:
    from hydra_llm.types import Node

__all__ = ["SocketCluster"]

_T = TypeVar("_T")


class SocketCluster(SimulatedCluster):
    """
    As `VirtualCluster`, but over real HTTP on loopback, and in real time at a multiple of its pace.

    The nodes are on a thread of their own, and the router's connections are those that it has in
    life. Nodes, router and probes have one fast clock, so all that is set in seconds keeps its
    proportion. What computing takes in real seconds does not: it counts ``speed`` times.

    Args:
        nodes: with ``speed=1``: the clock is fast already.
        speed: simulated seconds in a real one.
    """

    def __init__(self, nodes: Iterable[SimulatedNode], *, speed: float) -> None:
        super().__init__(nodes)
        self._time = FastClock(speed)
        self.loop = FastLoop(self._time)
        self.transport: httpx.AsyncBaseTransport = _OwnPool()

    def _new_thread(self) -> LoopThread:
        return LoopThread(clock=self._time)

    def stop(self) -> None:
        """Stop all nodes, and end whatever still runs."""
        if not self.loop.is_closed():
            self.run(_ended())
            self.run(self.loop.shutdown_asyncgens())  # with this the router's connections close
            self.run(self.loop.shutdown_default_executor())
            self.loop.close()
        super().stop()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Have something done, and give what it returns."""
        return self.loop.run_until_complete(work)

    def nodes(self, **overrides: Any) -> list[Node]:
        """Give the `hydra_llm.Node` of each; none of them is this machine."""
        return super().nodes(**({"local": False} | overrides))

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning."""
        return self._time.now()

    def clock(self) -> float:
        """Simulated seconds since the beginning."""
        return self._time.now()

    def wall_clock(self) -> float:
        """Simulated seconds since 1970."""
        return self._time.wall_now()


class _OwnPool(httpx.AsyncBaseTransport):
    """The connections that a router has in life."""

    def __init__(self) -> None:
        # To read the authorities takes 20 to 50 ms; this one trusts nobody.
        self._pools = Pools(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        pool = await self._pools.of_this_loop()
        return await pool.handle_async_request(request)


async def _ended() -> None:
    """End all other tasks."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
