"""A router's thread that shares its leases and rates with other routers.

::

    made ──start()──▶ joining ──▶ together ◀──▶ alone
      ▲                  │           │            │
      └─fork, in the child           └──stop()────┴──▶ stopped

Joining and together, a lease is bound once the others have left room for it. Alone, nobody is
asked and nobody waits; the thread tries again every second, and then tells all that is held.
Stopped is final.

One thread talks for all of a router's threads and event loops: what they claim at one time goes
in one message, a slow server stops none of them, and a fork has one connection to forget.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, Literal, Protocol

from hydra_llm.cluster.claims import PATIENCE_SECONDS, Claim, settle
from hydra_llm.cluster.cluster import Cluster
from hydra_llm.cluster.exchange import CORDONS_KEY, Exchange, Seen, name_of
from hydra_llm.cluster.lease import Lease
from hydra_llm.cluster.rates import Seed, message_of, rates_in
from hydra_llm.cluster.redis_store import StoreError
from hydra_llm.events import SharingLost, SharingRestored
from hydra_llm.types import Node

__all__ = ["Sharing", "Store"]

log = logging.getLogger("hydra_llm")

WAITING_BEAT_SECONDS = 0.02
"""Between two messages while requests wait here: a place elsewhere may become free."""
BEAT_SECONDS = 0.1
"""The same while requests are in flight, but none waits."""
IDLE_BEAT_SECONDS = 0.5
"""The same while there are none: what has gone stale then is put right by the next claim."""
RETRY_SECONDS = 1.0
"""Between two tries to join again."""
LEASE_SECONDS = 15.0
"""How long a lease outlives the last word of its router, which renews it every five seconds."""
RATES_SECONDS = 5.0
"""Between two looks at what the others have measured."""
CORDONS_SECONDS = 1.0
"""Between two looks at which nodes are cordoned."""


class Store(Protocol):
    """What routers have in common; it raises StoreError while it cannot be used."""

    def exchange(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        """One message of :mod:`.exchange`, one answer."""
        ...

    def rates(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        """One message of :mod:`.rates`, one answer."""
        ...

    def cordoned(self, key: str) -> Container[str]:
        """The names of the nodes that are cordoned; see :func:`.exchange.name_of`."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Sharing:
    """
    Tells other routers what this one holds, and asks them before it takes more.

    Args:
        new_store: makes the store, anew for each process.
        name: what to call the store in a message.
        cluster: the router's ledger; no strong reference is kept.
        nodes: as configured.
        refresh: has a node probed at once.
        clock: the ledger's.
    """

    def __init__(
        self,
        new_store: Callable[[], Store],
        cluster: Cluster,
        nodes: Sequence[Node],
        *,
        name: str = "Redis",
        refresh: Callable[[str], object] = lambda node_id: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._new_store = new_store
        self._name = name
        self._cluster = weakref.ref(cluster)
        self._nodes = tuple(nodes)
        self._refresh = refresh
        self._clock = clock
        self._state: Literal["made", "joining", "together", "alone", "stopped"] = "made"
        self._begin()
        cluster.share(self._hurry)
        _sharings.add(self)

    def _begin(self) -> None:
        # Reentrant: stop() is a finalizer and may come in anywhere.
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._claims: list[Claim] = []
        self._looks: list[Future[bool]] = []
        self._seeds: list[Seed] = []
        self._rates_at: float | None = None
        self._cordons_at: float | None = None
        self._exchange = Exchange(uuid.uuid4().hex, self._nodes, lease_seconds=LEASE_SECONDS)

    def _hurry(self) -> None:
        self._wake.set()  # looked up when called: in a forked child it is another one

    def __repr__(self) -> str:
        return f"<Sharing {self._state} | {self._name}>"

    @property
    def state(self) -> str:
        """One of the words in the drawing above."""
        return self._state

    # --------------------------------------------------------------- life cycle

    def start(self) -> None:
        """Begin; done already, or stopped, it does nothing."""
        if self._state != "made":
            return
        with self._lock:
            if self._state != "made":
                return
            thread = threading.Thread(target=self._main, name="hydra-llm-sharing", daemon=True)
            self._state = "joining"
            try:
                thread.start()
            except BaseException:
                self._state = "made"
                raise
            self._thread = thread

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Take leave of the others and end the thread; safe to call twice, from anywhere."""
        with self._lock:
            self._state = "stopped"
            thread = self._thread
            self._settle_all()
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)

    def forget_the_parents(self) -> None:
        """In a forked child: thread, connection and leases are the parent's."""
        stopped = self._state == "stopped"
        self._begin()
        self._state = "stopped" if stopped else "made"

    def add_nodes(self, nodes: Iterable[Node]) -> None:
        """Share further nodes too; to be told before the ledger is."""
        with self._lock:
            self._nodes = (*self._nodes, *nodes)

    # ------------------------------------------------------------------- asking

    def claim(self, lease: Lease, room: int) -> Claim | None:
        """
        Ask the others whether a lease may be bound; None if there is nobody to ask.

        Args:
            lease: held, and not sent yet.
            room: requests for its model that its runner may hold together with it.
        """
        with self._lock:
            if self._state in ("joining", "together"):
                claim = Claim(lease, room, self)
                self._claims.append(claim)
                self._wake.set()
                return claim
        self._bind(lease)
        return None

    def _bind(self, lease: Lease) -> None:
        """The lease is used from now on, so the others are told of it."""
        lease.shared_by = self._exchange.router

    def give_back(self, lease: Lease) -> None:
        """Whoever has claimed the lease has gone."""
        cluster = self._cluster()
        if cluster is not None:
            cluster.release(lease)

    def go_on_alone(self, lease: Lease) -> None:
        """The others' word on the lease has not come in time."""
        self._bind(lease)
        self._lose(f"no answer in {PATIENCE_SECONDS:g} s")

    def catch_up(self) -> None:
        """Wait, but not for long, until the others have been heard."""
        with suppress(FutureTimeoutError):
            self._look().result(PATIENCE_SECONDS)

    async def acatch_up(self) -> None:
        """As :meth:`catch_up`, without blocking the event loop."""
        heard = asyncio.wrap_future(self._look())
        try:
            await asyncio.wait({heard}, timeout=PATIENCE_SECONDS)
        finally:
            heard.cancel()

    def _look(self) -> Future[bool]:
        look: Future[bool] = Future()
        with self._lock:
            if self._state in ("joining", "together"):
                self._looks.append(look)
                self._wake.set()
                return look
        settle(look, False)
        return look

    # ------------------------------------------------------------ on the thread

    def _main(self) -> None:
        wake = self._wake
        seconds: float | None = 0.0
        while seconds is not None:
            wake.wait(seconds)
            wake.clear()
            seconds = self.beat()
        self._leave()

    def beat(self) -> float | None:
        """One message and its answer; seconds until the next, None when it is over."""
        cluster = self._cluster()
        if cluster is None or self._state == "stopped":
            return None
        with self._lock:
            claims = [claim for claim in self._claims if claim.lease.is_held]
            looks = self._looks
            self._claims, self._looks = [], []
            if len(self._nodes) != len(self._exchange.numbers):
                self._exchange.know(self._nodes)
        try:
            seen = self._talk(cluster, claims)
            self._regain()
            self._take_in(cluster, seen, claims)
            if looks or self._is_due(self._rates_at, RATES_SECONDS):
                self._share_rates(cluster)
            if looks or self._is_due(self._cordons_at, CORDONS_SECONDS):
                self._look_for_cordons(cluster)
        except StoreError as error:
            self._lose(str(error))
        except Exception as error:  # what is stored there is not ours, or ours is wrong
            log.exception("sharing through %s failed", self._name)
            self._lose(f"{type(error).__name__}: {error}")
        finally:
            # Whoever has no word by now goes on without.
            for claim in claims:
                self._settle(claim, True)
            for look in looks:
                settle(look, self._state == "together")
        if self._state == "alone":
            return RETRY_SECONDS
        if cluster.waiting:
            return WAITING_BEAT_SECONDS
        return BEAT_SECONDS if claims or cluster.in_flight else IDLE_BEAT_SECONDS

    def _is_due(self, last: float | None, seconds: float) -> bool:
        return last is None or self._clock() - last >= seconds

    def _look_for_cordons(self, cluster: Cluster) -> None:
        assert self._store is not None
        self._cordons_at = self._clock()
        names = self._store.cordoned(CORDONS_KEY)
        # While Redis is away, what it said last holds.
        cluster.set_cordons("Redis", {n.id for n in self._nodes if name_of(n) in names})

    def _talk(self, cluster: Cluster, claims: Sequence[Claim]) -> Seen:
        store = self._store = self._store or self._new_store()
        for _ in range(2):
            now = self._clock()
            message = self._exchange.message(cluster.held(), claims, cluster.wishes(), now)
            seen = self._exchange.seen(store.exchange(self._exchange.keys, message), self._clock())
            if seen is not None:
                return seen
        raise StoreError("it forgets at once what it is told")

    def _take_in(self, cluster: Cluster, seen: Seen, claims: Sequence[Claim]) -> None:
        # First the sight, then the word: whoever is refused chooses again with open eyes.
        changed = cluster.see_others(seen.leases, seen.wishes)
        for node_id in changed:
            self._refresh(node_id)
        for claim, is_granted in zip(claims, seen.granted, strict=True):
            self._settle(claim, is_granted)

    def _settle(self, claim: Claim, is_granted: bool) -> None:
        if claim.answer.done():
            return
        if is_granted:
            self._bind(claim.lease)
        claim.settle(is_granted)

    def _settle_all(self) -> None:
        claims, self._claims = self._claims, []
        looks, self._looks = self._looks, []
        for claim in claims:
            self._settle(claim, True)
        for look in looks:
            settle(look, False)

    def _share_rates(self, cluster: Cluster) -> None:
        assert self._store is not None
        self._rates_at = self._clock()
        # What is lost on the way is not sent again: it may have been counted.
        seeds, self._seeds = self._seeds, []
        talk = self._exchange
        message = message_of(cluster.samples(), seeds, talk.numbers)
        answer = self._store.rates(talk.rates_keys, message)
        self._seeds = cluster.adopt(rates_in(answer, list(talk.numbers)))

    # -------------------------------------------------------------------- alone

    def _lose(self, reason: str) -> None:
        """Go on alone, and say so if that is news."""
        with self._lock:
            self._exchange.forget()
            was, cluster = self._state, self._cluster()
            if was in ("alone", "stopped"):
                return
            self._state = "alone"
            self._settle_all()
        if cluster is None:
            return
        cluster.see_others({node.id: {} for node in self._nodes}, {})
        log.warning("%s is away (%s): this router goes on alone", self._name, reason)
        cluster.tell(SharingLost(at=self._clock(), reason=reason))

    def _regain(self) -> None:
        with self._lock:
            was, cluster = self._state, self._cluster()
            if was in ("made", "joining", "alone"):
                self._state = "together"
        if was == "alone" and cluster is not None:
            log.warning("%s is back: this router shares its requests again", self._name)
            cluster.tell(SharingRestored(at=self._clock()))

    def _leave(self) -> None:
        store, self._store = self._store, None
        if store is None:
            return
        cluster = self._cluster()
        with suppress(Exception):  # its leases expire by themselves
            talk = self._exchange
            store.exchange(talk.keys, talk.farewell())
            if cluster is not None:
                store.rates(talk.rates_keys, message_of(cluster.samples(), (), talk.numbers))
        with suppress(Exception):
            store.close()


# -------------------------------------------------------------------------- forks

_sharings: weakref.WeakSet[Sharing] = weakref.WeakSet()


def _in_the_child() -> None:
    for sharing in _sharings:
        sharing.forget_the_parents()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_the_child)
