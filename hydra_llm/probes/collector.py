"""The one background thread of a router: it asks every node, again and again.

::

    made ──start()──▶ running ──stop()──▶ stopped
                        └──fork──▶ made, in the child

Stopped is final. Each node has a task of its own, so a node that hangs delays no other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import random
import ssl
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import httpx

from hydra_llm.probes.local import LocalMemory
from hydra_llm.probes.node import NodeProbe, ShowCache
from hydra_llm.types import Node, Observation

__all__ = ["Collector"]

log = logging.getLogger("hydra_llm")

JITTER = 0.1
"""Share by which the interval varies, so that routers and nodes do not fall into step."""

SHOWS_PER_ROUND = 4
"""Models a node is asked about after a round, as the answers are long."""

FIRST_GRACE_SECONDS = 0.25
"""How long the first request waits for other nodes once one is up."""

TICK_SECONDS = 1.0

CLOSE_SECONDS = 2.0

LIMITS = httpx.Limits(
    max_connections=None,
    max_keepalive_connections=None,
    # Shorter than a round: what a node or proxy is about to close must not be used again.
    keepalive_expiry=2.0,
)

Observer = Callable[[Observation], object]
SslContext = ssl.SSLContext | Callable[[], ssl.SSLContext] | None


class Probe(Protocol):
    """Looks at one node: see :class:`NodeProbe`."""

    node: Node

    async def probe(self) -> Observation:
        """Look once."""
        ...

    async def learn(self) -> bool:
        """Learn one more thing of less urgency; whether there may be another."""
        ...

    def with_what_was_learned(self) -> Observation | None:
        """The last observation with what was learned since, if anything was."""
        ...


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
        monitor_vram: whether to read the memory of this machine, for nodes that run on it.
        clock: of ``observed_at``.
        rng: draws the jitter.
        ssl_context: for nodes with https, or what makes it once it is needed.
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
        rng: random.Random | None = None,
        ssl_context: SslContext = None,
    ) -> None:
        self._nodes = tuple(nodes)
        self._on_observation = on_observation
        self._interval = interval_seconds
        self._timeout = timeout_seconds
        self._monitor_vram = monitor_vram
        self._clock = clock
        self._rng = random.Random() if rng is None else rng
        self._ssl_context = ssl_context
        self._ticks: list[Callable[[], object]] = []
        # Reentrant: the garbage collector may call stop() where start() holds it.
        self._lock = threading.RLock()
        self._run: _Run | None = None
        self._is_stopped = False
        _collectors.add(self)

    def __repr__(self) -> str:
        state = "stopped" if self._is_stopped else "running" if self._run else "not started"
        return f"<Collector {state} | {len(self._nodes)} nodes>"

    # --------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Begin to probe; done already, or stopped, it does nothing."""
        if self._run is not None or self._is_stopped:
            return
        context = self._tls()
        with self._lock:
            if self._run is not None or self._is_stopped:
                return
            run = _Run(
                self._nodes,
                self._on_observation,
                self._ticks,
                interval_seconds=self._interval,
                timeout_seconds=self._timeout,
                monitor_vram=self._monitor_vram,
                clock=self._clock,
                rng=self._rng,
                ssl_context=context,
            )
            run.start()
            weakref.finalize(self, run.request_stop)
            self._run = run

    def _tls(self) -> ssl.SSLContext | bool:
        if not any(node.url.startswith("https:") for node in self._nodes):
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

    def forget_the_parents(self) -> None:
        """In a forked child: the thread is not here, and its loop and sockets are the parent's."""
        self._lock = threading.RLock()
        if self._run is not None:
            # Freed, they would be closed, and the parent's loop would lose its sockets.
            _abandoned.append(self._run)
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
        return _wait(self._seen_after_now(node_ids), timeout_seconds)

    async def arefresh_and_wait(
        self, node_ids: Iterable[str] | None = None, timeout_seconds: float = 3.0
    ) -> bool:
        """As :meth:`refresh_and_wait`, without blocking the event loop."""
        return await _await(self._seen_after_now(node_ids), timeout_seconds)

    def _seen_after_now(self, node_ids: Iterable[str] | None) -> list[Future[bool]]:
        self.start()
        run = self._run
        if run is None:
            return [_settled(False)]
        seen = run.refresh(node_ids)
        # Its own thread cannot wait for itself.
        return [_settled(False)] if run.is_this_thread() else seen

    def wait_first(self, timeout_seconds: float) -> None:
        """
        Wait for a first look at the nodes.

        It ends when every node has answered or failed once, or a quarter of a second after
        one was seen up, or when the time is over: a node that hangs costs no more than that.
        """
        _wait(self._first_seen(), timeout_seconds)

    async def await_first(self, timeout_seconds: float) -> None:
        """As :meth:`wait_first`, without blocking the event loop."""
        await _await(self._first_seen(), timeout_seconds)

    def _first_seen(self) -> list[Future[bool]]:
        self.start()
        run = self._run
        return [] if run is None or run.is_this_thread() else [run.when_first_seen()]


# -------------------------------------------------------------------- one thread


class _Run:
    """One thread with its event loop, from start to stop. It does not know its Collector."""

    def __init__(
        self,
        nodes: Sequence[Node],
        on_observation: Observer,
        ticks: Sequence[Callable[[], object]],
        *,
        interval_seconds: float,
        timeout_seconds: float,
        monitor_vram: bool,
        clock: Callable[[], float],
        rng: random.Random,
        ssl_context: ssl.SSLContext | bool,
    ) -> None:
        self._nodes = nodes
        self._on_observation = on_observation
        self._ticks = ticks
        self._interval = interval_seconds
        self._timeout = timeout_seconds
        self._monitor_vram = monitor_vram
        self._clock = clock
        self._rng = rng
        self._ssl_context = ssl_context
        self._process = os.getpid()
        # Reentrant, as above: request_stop() is a finalizer too.
        self._lock = threading.RLock()
        self._first = _FirstLook({node.id for node in nodes})
        self._is_over = False
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_Errands())
        self._stopping = asyncio.Event()
        self._watches: dict[str, NodeWatch] = {}
        for node in nodes:
            self._watches[node.id] = NodeWatch(
                node.id, self._observe, interval_seconds=interval_seconds, rng=rng
            )
        self._thread = threading.Thread(target=self._main, name="hydra-llm-collector", daemon=True)

    def start(self) -> None:
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def join(self, timeout_seconds: float) -> None:
        if not self.is_this_thread():
            self._thread.join(timeout_seconds)

    def request_stop(self) -> None:
        self._call_soon(self._stopping.set)

    def refresh(self, node_ids: Iterable[str] | None) -> list[Future[bool]]:
        """One future for each node: it is done when a round that begins after now has ended."""
        wanted = self._watches.keys() if node_ids is None else node_ids
        asked = {self._watches[one]: Future[bool]() for one in wanted if one in self._watches}

        def ask() -> None:
            for watch, seen in asked.items():
                watch.refresh(seen)

        if not self._call_soon(ask):
            return [_settled(False)]
        return list(asked.values())

    def when_first_seen(self) -> Future[bool]:
        """Done once the first look at the nodes is."""
        seen = Future[bool]()
        if not self._call_soon(lambda: self._first.add(seen)):
            return _settled(False)
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

    # ------------------------------------------------------------ on the thread

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        except Exception:
            log.exception("the collector thread failed")
        finally:
            with self._lock:
                self._is_over = True
            # This also answers what was asked for in the last moment.
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._first.end()
            for watch in self._watches.values():
                watch.end()
            self._loop.close()

    async def _work(self) -> None:
        transport = httpx.AsyncHTTPTransport(
            verify=self._ssl_context, limits=LIMITS, trust_env=False
        )
        local = LocalMemory(clock=self._clock) if self._monitor_vram else None
        shown = ShowCache()
        tasks = [asyncio.ensure_future(self._tick())]
        for node in self._nodes:
            probe = NodeProbe(
                node,
                transport,
                shown=shown,
                local=local if node.local else None,
                timeout_seconds=self._timeout,
                clock=self._clock,
            )
            tasks.append(asyncio.ensure_future(self._watches[node.id].run(probe)))
        try:
            await self._stopping.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(transport.aclose(), CLOSE_SECONDS)
            if local is not None:
                local.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for callback in tuple(self._ticks):
                try:
                    callback()
                except Exception:
                    log.exception("a tick failed")

    def _observe(self, seen: Observation) -> None:
        try:
            self._on_observation(seen)
        except Exception:
            log.exception("what was seen of node %s could not be taken in", seen.node_id)
        self._first.note(seen)


class _FirstLook:
    """Who waits for the first look at the nodes; lives on the collector's thread."""

    def __init__(self, unseen: set[str]) -> None:
        self._unseen = unseen
        self._waiting: list[Future[bool]] = []
        self._is_done = not unseen
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiting: Future[bool]) -> None:
        if self._is_done:
            _settle(waiting, True)
        else:
            self._waiting.append(waiting)

    def note(self, seen: Observation) -> None:
        if self._is_done:
            return
        self._unseen.discard(seen.node_id)
        if not self._unseen:
            self.end()
        elif seen.health == "up" and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FIRST_GRACE_SECONDS, self.end)

    def end(self) -> None:
        self._is_done = True
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            _settle(one, True)
        if self._timer is not None:
            self._timer.cancel()


class NodeWatch:
    """
    The rounds at one node; everything but the making happens on one event loop.

    Args:
        node_id: for the log.
        on_observation: called with each observation.
        interval_seconds: from the beginning of a round to the next, give or take a tenth.
        rng: draws the jitter.
        now: what the interval is measured with.
        sleep: ends after so many seconds, or when the event is set.
    """

    def __init__(
        self,
        node_id: str,
        on_observation: Callable[[Observation], None],
        *,
        interval_seconds: float,
        rng: random.Random,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[asyncio.Event, float], Awaitable[None]] | None = None,
    ) -> None:
        self._node_id = node_id
        self._on_observation = on_observation
        self._interval = interval_seconds
        self._rng = rng
        self._now = now
        self._sleep = _set_within if sleep is None else sleep
        self._wanted = asyncio.Event()
        self._waiting: list[Future[bool]] = []
        """Who asked for the next round."""
        self._served: list[Future[bool]] = []
        """Who asked for the one under way."""

    def refresh(self, seen: Future[bool] | None = None) -> None:
        """Have another round begin at once, or right after the one under way."""
        if seen is not None:
            self._waiting.append(seen)
        self._wanted.set()

    def end(self) -> None:
        """Let nobody wait for what will not come."""
        self._waiting, waiting = [], self._served + self._waiting
        for one in waiting:
            _settle(one, False)

    async def run(self, probe: Probe) -> None:
        """Round after round, until cancelled."""
        while True:
            began = self._now()
            self._wanted.clear()
            await self._round(probe)
            # The first rounds begin together; this spreads the later ones.
            period = self._interval * self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)
            await self._sleep(self._wanted, max(0.0, began + period - self._now()))

    async def _round(self, probe: Probe) -> None:
        self._served, self._waiting = self._waiting, []
        try:
            seen = await probe.probe()
            self._on_observation(seen)
            for one in self._served:
                _settle(one, True)
            if seen.health == "up":
                await self._learn(probe)
        except Exception as error:
            # A fault of ours must not end the probing. Only where it was: an error's own text
            # may quote a header.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("probing node %s: %s\n%s", self._node_id, type(error).__name__, where)  # noqa: TRY400
            for one in self._served:
                _settle(one, False)

    async def _learn(self, probe: Probe) -> None:
        for _ in range(SHOWS_PER_ROUND):
            if self._wanted.is_set() or not await probe.learn():
                break
        learned = probe.with_what_was_learned()
        if learned is not None:
            self._on_observation(learned)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


# ----------------------------------------------------------------------- threads


class _Errands(ThreadPoolExecutor):
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


def _settle(future: Future[bool], value: bool) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        future.set_result(value)


def _settled(value: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(value)
    return future


def _wait(futures: list[Future[bool]], timeout_seconds: float) -> bool:
    done, pending = concurrent.futures.wait(futures, timeout_seconds)
    for one in pending:
        one.cancel()
    return not pending and all(one.result() for one in done)


async def _await(futures: list[Future[bool]], timeout_seconds: float) -> bool:
    if not futures:
        return True
    wrapped = [asyncio.wrap_future(one) for one in futures]
    try:
        done, pending = await asyncio.wait(wrapped, timeout=timeout_seconds)
    finally:
        for one in wrapped:
            one.cancel()
    return not pending and all(one.result() for one in done)


# -------------------------------------------------------------------------- forks

_collectors: weakref.WeakSet[Collector] = weakref.WeakSet()
_abandoned: list[_Run] = []


def _in_the_child() -> None:
    for collector in _collectors:
        collector.forget_the_parents()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_the_child)
