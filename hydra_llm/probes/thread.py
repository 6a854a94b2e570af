"""The collector's work on an event loop, and the thread that it has as a rule."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from hydra_llm.probes.exporters.watch import KEPT_SECONDS, ExporterWatch
from hydra_llm.probes.futures import settle, settled
from hydra_llm.probes.local import LocalMemory
from hydra_llm.probes.node import NodeProbe
from hydra_llm.probes.shown import ShowCache
from hydra_llm.probes.watch import NodeWatch
from hydra_llm.types import Node, Observation
from hydra_llm.world import World

__all__ = ["CollectorRun", "CollectorTask", "CollectorThread"]

log = logging.getLogger("hydra_llm")

FIRST_GRACE_SECONDS = 0.25
"""How long the first request waits for other nodes once one is up."""

TICK_SECONDS = 1.0

CLOSE_SECONDS = 2.0

CANCEL_TRIES = 10
"""Before Python 3.12, ``wait_for`` may swallow a cancellation (bpo-37658)."""

LIMITS = httpx.Limits(
    max_connections=None,
    max_keepalive_connections=None,
    # Shorter than a round: what a node or proxy is about to close must not be used again.
    keepalive_expiry=2.0,
)

Observer = Callable[[Observation], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Whom to ask and how; see :class:`hydra_llm.probes.collector.Collector`."""

    nodes: tuple[Node, ...]
    on_observation: Observer
    ticks: Sequence[Callable[[], object]]
    interval_seconds: float
    timeout_seconds: float
    monitor_vram: bool
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    rng: random.Random


class CollectorRun(ABC):
    """The probing on one event loop, from start to stop. It does not know its Collector."""

    def __init__(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        self._plan = plan
        self._loop = loop
        self._process = os.getpid()
        # Reentrant: request_stop() is a finalizer and may come in anywhere.
        self._lock = threading.RLock()
        self._first = FirstLook({node.id for node in plan.nodes})
        self._is_over = False
        self._stopping = asyncio.Event()
        self._watches = {
            node.id: NodeWatch(
                node.id,
                self._observe,
                interval_seconds=plan.interval_seconds,
                rng=plan.rng,
                now=plan.clock,
            )
            for node in plan.nodes
        }

    @abstractmethod
    def start(self) -> None:
        """Begin."""

    @abstractmethod
    def is_this_thread(self) -> bool:
        """Whether the caller runs on its thread."""

    @abstractmethod
    def join(self, timeout_seconds: float) -> None:
        """Wait for its end, unless on its thread."""

    @abstractmethod
    async def ended(self) -> None:
        """As :meth:`join`, without blocking the event loop."""

    def request_stop(self) -> None:
        """Have it end soon; from anywhere, and more than once."""
        self._call_soon(self._stopping.set)

    def refresh(self, node_ids: Iterable[str] | None) -> list[Future[bool]]:
        """One future for each node: it is done when a round that begins after now has ended."""
        wanted = self._watches.keys() if node_ids is None else node_ids
        asked = {self._watches[one]: Future[bool]() for one in wanted if one in self._watches}

        def ask() -> None:
            for watch, seen in asked.items():
                watch.refresh(seen)

        if not self._call_soon(ask):
            return [settled(False)]
        return list(asked.values())

    def when_first_seen(self) -> Future[bool]:
        """Done once the first look at the nodes is."""
        seen = Future[bool]()
        if not self._call_soon(lambda: self._first.add(seen)):
            return settled(False)
        return seen

    def _call_soon(self, call: Callable[[], object]) -> bool:
        """Have something done on the thread; false when it has ended."""
        if self._process != os.getpid():
            return False
        with self._lock:
            if self._is_over:
                return False
            self._loop.call_soon_threadsafe(call)
            return True

    # -------------------------------------------------------------- on the loop

    def _end(self) -> None:
        """Nothing is taken on any more."""
        with self._lock:
            self._is_over = True

    def _let_nobody_wait(self) -> None:
        self._first.end()
        for watch in self._watches.values():
            watch.end()

    async def _work(self, transport: httpx.AsyncBaseTransport) -> None:
        local = LocalMemory(clock=self._plan.clock) if self._plan.monitor_vram else None
        shown = ShowCache()
        tasks = [asyncio.ensure_future(self._tick())]
        exporters: list[ExporterWatch] = []
        for node in self._plan.nodes:
            exporter = self._exporter_of(node, transport)
            if exporter is not None:
                exporters.append(exporter)
            probe = NodeProbe(
                node,
                transport,
                shown=shown,
                local=local if node.local else None,
                exporter=exporter,
                timeout_seconds=self._plan.timeout_seconds,
                clock=self._plan.clock,
                wall_clock=self._plan.wall_clock,
            )
            tasks.append(asyncio.ensure_future(self._watches[node.id].run(probe)))
        try:
            await self._stopping.wait()
        finally:
            await _cancel(tasks)
            # After the rounds, which begin them.
            await _cancel(page for exporter in exporters for page in exporter.under_way)
            if local is not None:
                local.close()

    def _exporter_of(self, node: Node, transport: httpx.AsyncBaseTransport) -> ExporterWatch | None:
        if node.exporter is None or not self._plan.monitor_vram:
            return None
        return ExporterWatch(
            node,
            transport,
            timeout_seconds=self._plan.timeout_seconds,
            # A slow page comes too late for its own round, and has to serve the next one.
            kept_seconds=max(KEPT_SECONDS, 2.5 * self._plan.interval_seconds),
            clock=self._plan.clock,
            wall_clock=self._plan.wall_clock,
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for callback in tuple(self._plan.ticks):
                try:
                    callback()
                except Exception:
                    log.exception("a tick failed")

    def _observe(self, seen: Observation) -> None:
        try:
            self._plan.on_observation(seen)
        except Exception:
            log.exception("what was seen of node %s could not be taken in", seen.node_id)
        self._first.note(seen)


class CollectorThread(CollectorRun):
    """Probes on a thread with an event loop of its own."""

    def __init__(self, plan: Plan, ssl_context: ssl.SSLContext | bool) -> None:
        loop = asyncio.new_event_loop()
        loop.set_default_executor(Errands())
        super().__init__(plan, loop)
        self._ssl_context = ssl_context
        self._thread = threading.Thread(target=self._main, name="hydra-llm-collector", daemon=True)

    def start(self) -> None:
        """Begin."""
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    def is_this_thread(self) -> bool:
        """Whether the caller runs on it."""
        return threading.current_thread() is self._thread

    def join(self, timeout_seconds: float) -> None:
        """Wait for its end, unless on it."""
        if not self.is_this_thread():
            self._thread.join(timeout_seconds)

    async def ended(self) -> None:
        """As :meth:`join`, without blocking the event loop."""
        await asyncio.to_thread(self.join, CLOSE_SECONDS)

    async def _connect_and_work(self) -> None:
        transport = httpx.AsyncHTTPTransport(
            verify=self._ssl_context, limits=LIMITS, trust_env=False
        )
        try:
            await self._work(transport)
        finally:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(transport.aclose(), CLOSE_SECONDS)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._connect_and_work())
        except Exception:
            log.exception("the collector thread failed")
        finally:
            self._end()
            # This also answers what was asked for in the last moment.
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._let_nobody_wait()
            self._loop.close()


class CollectorTask(CollectorRun):
    """Probes on the loop of a world that stands in for the machine, and through its transport."""

    def __init__(self, plan: Plan, world: World) -> None:
        super().__init__(plan, world.loop)
        self._world = world
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with the loop's next turn."""
        self._task = self._loop.create_task(self._main())

    def is_this_thread(self) -> bool:
        """Say that it is: in such a world there is one thread, and it cannot wait for itself."""
        return True

    def join(self, timeout_seconds: float) -> None:
        """Do not wait: see :meth:`ended`."""

    async def ended(self) -> None:
        """Wait for its end."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _call_soon(self, call: Callable[[], object]) -> bool:
        try:
            return super()._call_soon(call)
        except RuntimeError:  # the world has ended before it, loop and all
            return False

    async def _main(self) -> None:
        try:
            await self._work(self._world.transport)
        except Exception:
            log.exception("the collector failed")
        finally:
            self._end()
            await asyncio.sleep(0)  # what was asked for in the last moment
            self._let_nobody_wait()


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    pending = set(tasks)
    for _ in range(CANCEL_TRIES if pending else 0):
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CLOSE_SECONDS / CANCEL_TRIES)
        if not pending:
            break


class FirstLook:
    """Who waits for the first look at the nodes; lives on the collector's thread."""

    def __init__(self, unseen: set[str]) -> None:
        self._unseen = unseen
        self._waiting: list[Future[bool]] = []
        self._is_done = not unseen
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiting: Future[bool]) -> None:
        """Settle it once the look is done."""
        if self._is_done:
            settle(waiting, True)
        else:
            self._waiting.append(waiting)

    def note(self, seen: Observation) -> None:
        """One more node was seen."""
        if self._is_done:
            return
        self._unseen.discard(seen.node_id)
        if not self._unseen:
            self.end()
        elif seen.health == "up" and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FIRST_GRACE_SECONDS, self.end)

    def end(self) -> None:
        """Wait no longer."""
        self._is_done = True
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            settle(one, True)
        if self._timer is not None:
            self._timer.cancel()


class Errands(ThreadPoolExecutor):
    """
    Runs each call in a daemon thread of its own.

    What blocks here is the system's resolver and the GPU's driver. Neither may keep other
    nodes waiting for a worker, nor the interpreter from ending.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a thread for the call."""
        result: Future[Any] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:  # it belongs to whoever asked
                result.set_exception(error)
            else:
                result.set_result(value)

        threading.Thread(target=run, name="hydra-llm-errand", daemon=True).start()
        return result
