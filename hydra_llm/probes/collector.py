"""The one background thread of a router: it asks every node, again and again.

::

    made ──start()──▶ running ──stop()──▶ stopped
                        └──fork──▶ made, in the child

Stopped is final. Each node has a task of its own, so a node that hangs delays no other.
"""

from __future__ import annotations

import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from hydra_llm.probes.futures import settled, wait_async, wait_sync
from hydra_llm.probes.thread import CollectorRun, CollectorTask, CollectorThread, Observer, Plan
from hydra_llm.types import Node
from hydra_llm.world import World

__all__ = ["Collector"]

SslContext = ssl.SSLContext | Callable[[], ssl.SSLContext] | None


class Collector:
    """
    Probes nodes in the background and hands on what it sees.

    ::

        collector = Collector(nodes, cluster.observe)
        collector.start()
        collector.wait_first(2.5)

    Args:
        nodes: whom to ask.
        on_observation: called with each :class:`Observation`, on the collector's thread. It is
            held for as long as the thread runs: give it no strong reference to the router.
        interval_seconds: between two rounds at a node, give or take a tenth.
        timeout_seconds: for each answer of a node.
        monitor_vram: whether to read the memory of this machine, for nodes that run on it, and
            the nodes' exporters.
        clock: of ``observed_at``.
        wall_clock: Unix time, in which Ollama says when a model will go.
        rng: draws the jitter.
        ssl_context: for https, of nodes and exporters, or what makes it once it is needed.
        world: where to work instead of on a thread and a network.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        on_observation: Observer,
        *,
        interval_seconds: float = 5.0,
        timeout_seconds: float = 2.0,
        monitor_vram: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        ssl_context: SslContext = None,
        world: World | None = None,
    ) -> None:
        self._ticks: list[Callable[[], object]] = []
        self._plan = Plan(
            nodes=tuple(nodes),
            on_observation=on_observation,
            ticks=self._ticks,
            interval_seconds=interval_seconds,
            timeout_seconds=timeout_seconds,
            monitor_vram=monitor_vram,
            clock=clock,
            wall_clock=wall_clock,
            rng=random.Random() if rng is None else rng,
        )
        self._ssl_context = ssl_context
        self._world = world
        # Reentrant: the garbage collector may call stop() where start() holds it.
        self._lock = threading.RLock()
        self._run: CollectorRun | None = None
        self._is_stopped = False
        _collectors.add(self)

    def __repr__(self) -> str:
        state = "stopped" if self._is_stopped else "running" if self._run else "not started"
        return f"<Collector {state} | {len(self._plan.nodes)} nodes>"

    # --------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Begin to probe; done already, or stopped, it does nothing."""
        if self._run is not None or self._is_stopped:
            return
        context = self._tls() if self._world is None else False
        with self._lock:
            if self._run is not None or self._is_stopped:
                return
            run: CollectorRun
            if self._world is None:
                run = CollectorThread(self._plan, context)
            else:
                run = CollectorTask(self._plan, self._world)
            run.start()
            weakref.finalize(self, run.request_stop)
            self._run = run

    @property
    def is_started(self) -> bool:
        """Whether it probes."""
        return self._run is not None and not self._is_stopped

    def _tls(self) -> ssl.SSLContext | bool:
        if not any(node.uses_tls for node in self._plan.nodes):
            # Reading the authorities takes 20 to 50 ms; this one trusts nobody.
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self._ssl_context is None or isinstance(self._ssl_context, ssl.SSLContext):
            return self._ssl_context or True
        return self._ssl_context()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """
        End the thread and close its connections; waits for that unless called on that thread.

        Safe to call twice, from ``atexit`` and from finalizers.
        """
        with self._lock:
            self._is_stopped = True
            run = self._run
        if run is not None:
            run.request_stop()
            run.join(timeout_seconds)

    async def astop(self) -> None:
        """As :meth:`stop`, without blocking the event loop."""
        self.stop(0.0)
        if self._run is not None:
            await self._run.ended()

    def forget_the_parents(self) -> None:
        """In a forked child: the thread is not here, and its loop and sockets are the parent's."""
        self._lock = threading.RLock()
        # Not closed, as that would take the parent's sockets out of the parent's selector. Nor
        # is it freed: the frames of a thread that is not here hold it for good.
        self._run = None

    # ------------------------------------------------------------------- asking

    def add_tick(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called about once a second on the collector's thread."""
        self._ticks.append(callback)

    def refresh(self, node_ids: Iterable[str] | None = None) -> None:
        """Probe these nodes now, all by default; returns at once, from any thread."""
        if self._run is not None:
            self._run.refresh(node_ids)

    def refresh_and_wait(
        self, node_ids: Iterable[str] | None = None, timeout_seconds: float = 3.0
    ) -> bool:
        """Probe these nodes now and wait for it; whether all were seen in that time."""
        seen = self._seen_after_now(node_ids)
        # Its own thread cannot wait for itself.
        return not self._is_on_its_thread() and wait_sync(seen, timeout_seconds)

    async def arefresh_and_wait(
        self, node_ids: Iterable[str] | None = None, timeout_seconds: float = 3.0
    ) -> bool:
        """As :meth:`refresh_and_wait`, without blocking the event loop."""
        return await wait_async(self._seen_after_now(node_ids), timeout_seconds)

    def _seen_after_now(self, node_ids: Iterable[str] | None) -> list[Future[bool]]:
        self.start()
        run = self._run
        if run is None:
            return [settled(False)]
        return run.refresh(node_ids)

    def _is_on_its_thread(self) -> bool:
        return self._run is not None and self._run.is_this_thread()

    def wait_first(self, timeout_seconds: float) -> None:
        """
        Wait for a first look at the nodes.

        It ends when every node has answered or failed once, or a quarter of a second after
        one was seen up, or when the time is over: a node that hangs costs no more than that.
        """
        seen = self._first_seen()
        if not self._is_on_its_thread():
            wait_sync(seen, timeout_seconds)

    async def await_first(self, timeout_seconds: float) -> None:
        """As :meth:`wait_first`, without blocking the event loop."""
        await wait_async(self._first_seen(), timeout_seconds)

    def _first_seen(self) -> list[Future[bool]]:
        self.start()
        run = self._run
        return [] if run is None else [run.when_first_seen()]


# -------------------------------------------------------------------------- forks

_collectors: weakref.WeakSet[Collector] = weakref.WeakSet()


def _in_the_child() -> None:
    for collector in _collectors:
        collector.forget_the_parents()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_the_child)
