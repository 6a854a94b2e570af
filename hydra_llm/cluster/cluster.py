"""The ledger: what is known of each node, what is in flight there, who waits.

All of it changes under one lock, held for microseconds and never during I/O. Methods do
the books and return; what follows outside (waking those who waited, telling listeners) is
done after the lock is free.
"""

from __future__ import annotations

import itertools
import logging
import random
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

from hydra_llm.cluster.learning import AnswerLengths
from hydra_llm.cluster.lease import Lease
from hydra_llm.cluster.neighbours import LEDGER_LOCK, link, serve_lines
from hydra_llm.cluster.others import Others
from hydra_llm.cluster.prompt_cache import PrefixKey, PromptCacheIndex
from hydra_llm.cluster.rates import Rate, Sample, Seed
from hydra_llm.cluster.record import LOAD_STUCK_RETRY_SECONDS, NodeRecord, Rules
from hydra_llm.cluster.retries import RetryBudget
from hydra_llm.cluster.waiting import (
    HIGHEST_PRIORITY,
    OTHERS_TURN_SECONDS,
    URGENT_PRIORITY,
    Arrivals,
    Seen,
    Waiter,
    WaitingLine,
    Wish,
)
from hydra_llm.events import (
    AttemptFailed,
    CircuitClosed,
    CircuitOpened,
    Event,
    LeaseExpired,
    LoadPathStuck,
    NodeHealthChanged,
    PanicBegan,
    PanicEnded,
)
from hydra_llm.exceptions import (
    ModelLoadError,
    ModelNotFoundError,
    NodeAuthError,
    NodeBusyError,
    NodeConnectError,
    NodeError,
    NodeResponseError,
    QueueFullError,
    StreamBrokenError,
)
from hydra_llm.types import (
    DEMAND_MEMORY_SECONDS,
    Demand,
    InferenceRequest,
    Node,
    NodeSnapshot,
    Observation,
    Placement,
    RunningRequest,
    Usage,
    faded,
)
from hydra_llm.vram.accounting import numbers_of

log = logging.getLogger("hydra_llm")

Choose = Callable[
    [InferenceRequest, Sequence[NodeSnapshot], Mapping[str, Demand], float, int], Placement
]
"""``(request, nodes, demand, now, queue_ahead) -> Placement``; raises NoEligibleNodeError."""

HERE = "here"
"""Who has cordoned a node: this router."""

ANY_MODEL = ""
"""In place of a model: who waits for a turn on the node keeps it from all that are not urgent."""

SWAP_PATIENCE = 4.0
"""A model in use or waited for is pushed out for one that has waited so many loads longer."""

CONVERSATIONS_KEPT = 8
"""Prompts a runner of Ollama >= 0.30 keeps in system memory, conservatively: it keeps up to
8 GiB of them. Before, a slot remembered its last prompt only."""


class Cluster:
    """
    The nodes' state and the requests in flight, for one router.

    Args:
        nodes: as configured.
        choose: the scheduler, as a function.
        clock: monotonic seconds.
        rng: for jitter.
        rules: how nodes are judged.
        on_event: told what happened, outside the lock.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        choose: Choose,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        rules: Rules | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self._rules = rules or Rules()
        self._choose = choose
        self._clock = clock
        self._on_event = on_event
        self._lock = LEDGER_LOCK
        self._rng = rng
        self._records: dict[str, NodeRecord] = {}
        self._snapshots: dict[str, NodeSnapshot] = {}
        self._published: tuple[NodeSnapshot, ...] = ()
        self._demand: Mapping[str, Demand] = {}
        self._counted_since: float | None = None
        self._lengths = AnswerLengths(self._rules.default_output_tokens)
        self._line = WaitingLine()
        self._budget = RetryBudget(ratio=self._rules.retry_ratio, floor=self._rules.retry_floor)
        self._cache_index = PromptCacheIndex()
        self._ids = itertools.count(1)
        self._outbox: list[Event] = []
        self._abandoned: deque[Lease] = deque()
        self._arrivals = Arrivals()
        self._resolved: list[Waiter] = []
        """Waiters that are to be told so once the lock is free."""
        self._others: Others | None = None
        self._is_in_panic = False
        self.moves = 0
        """Leases begun and ended so far."""
        self._near: weakref.WeakSet[Cluster] = weakref.WeakSet()
        """The ledgers of this process that have a node in common with this one."""
        self.add_nodes(nodes)

    def add_nodes(self, nodes: Iterable[Node]) -> None:
        """Take in further nodes, of other ids than those there are."""
        with self._lock:
            for node in nodes:
                record = self._records[node.id] = NodeRecord(node, self._rules, self._rng)
                record.is_shared = self._others is not None
                link(self, record)
                self._publish(record)

    # ------------------------------------------------------------- lock & mail

    @contextmanager
    def _books(self) -> Iterator[float]:
        """The lock, with the time; what happened meanwhile is told after it is free."""
        resolved: list[Waiter] = []
        events: list[Event] = []
        try:
            with self._lock:
                now = self._clock()
                if self._abandoned:
                    self._end_abandoned(now)
                try:
                    yield now
                finally:
                    if len(self._line) or self._waits_nearby():
                        resolved = serve_lines(self)
                    resolved, self._resolved = self._resolved + resolved, []
                    events, self._outbox = self._outbox, []
        finally:
            # Even if this caller is refused: the others' turn may have come.
            for waiter in resolved:
                waiter.notify()
            for event in events:
                self._announce(event)

    def _announce(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # a listener's mistake must not cost a request its lease
            log.exception("on_event failed for %s", event)

    def _publish(self, record: NodeRecord) -> None:
        self._snapshots[record.node.id] = record.snapshot()
        self._published = ()
        if record.neighbours:
            self._show_neighbours(record)

    def _show_neighbours(self, record: NodeRecord) -> None:
        for other, whose in record.neighbours.items():
            ledger = whose()
            if ledger is not None:
                ledger._snapshots[other.node.id] = other.snapshot()
                ledger._published = ()

    def _waits_nearby(self) -> bool:
        return bool(self._near) and any(len(ledger._line) for ledger in self._near)

    def _publish_leases(self, record: NodeRecord) -> None:
        """As :meth:`_publish`, where nothing has changed but the requests in flight."""
        if record.breaker.is_closed and not record.load_breakers:
            known = self._snapshots[record.node.id]
            self._snapshots[record.node.id] = known.with_running(record.running)
            self._published = ()
            if record.neighbours:
                self._show_neighbours(record)
        else:
            self._publish(record)

    def _nodes(self) -> tuple[NodeSnapshot, ...]:
        if not self._published:
            self._published = tuple(self._snapshots.values())
        return self._published

    # ----------------------------------------------------------------- reading

    def nodes(self) -> tuple[NodeSnapshot, ...]:
        """Every node as last seen, in the order of the configuration."""
        with self._lock:
            return self._nodes()

    def demand(self) -> Mapping[str, Demand]:
        """What every model is asked for."""
        with self._lock:
            return self._demand

    @property
    def in_flight(self) -> int:
        """Leases held."""
        with self._lock:
            return sum(len(record.leases) for record in self._records.values())

    @property
    def is_in_panic(self) -> bool:
        """Whether a node is used that would be left alone, were it not one of too many."""
        return self._is_in_panic

    @property
    def waiting(self) -> int:
        """Requests that wait in the router."""
        return len(self._line)

    def preview(self, request: InferenceRequest) -> Placement:
        """What would be chosen now, without booking it. Raises NoEligibleNodeError."""
        with self._lock:
            now = self._clock()
            ahead = self._line.ahead_of(request, now)
            return self._choose(request, self._nodes(), self._demand, now, ahead)

    # ----------------------------------------------------------------- leasing

    def acquire(self, request: InferenceRequest) -> Lease | Waiter:
        """
        Choose a node and book the request on it, in one step.

        Returns a :class:`Waiter` if the best node has no room for it now.

        Raises:
            NoEligibleNodeError: no node may take it.
            QueueFullError: too many wait already.
        """
        with self._books() as now:
            if not request.tried:
                self._count_arrival(request, now)
            if not len(self._line) and not self._lets_others_go_first(request, now, now):
                lease = self._try_lease(request, now)
                if lease is not None:
                    return lease
            waiter = Waiter(request, now)
            self._line.add(waiter)
        return self._served(waiter)

    def _served(self, waiter: Waiter) -> Lease | Waiter:
        # Closing the books has served the line; it may have been this one's turn already.
        displaced = self._refuse_if_too_many(waiter)
        if displaced is not None:
            displaced.notify()
        if waiter.lease is not None:
            return waiter.lease
        if waiter.error is not None:
            raise waiter.error
        return waiter

    def _refuse_if_too_many(self, waiter: Waiter) -> Waiter | None:
        """The least urgent has to go, be it the new one or not."""
        with self._lock:
            waiting = len(self._line) - 1
            if waiter.state != "waiting" or waiting < self._rules.max_queue:
                return None
            last = self._line.last
            self._line.remove(last)
            who = "" if last is waiter else "more urgent "
            last.refuse(
                QueueFullError(
                    f"{waiting} {who}requests wait for a free slot already (max_queue); "
                    "add a node or raise max_queue",
                    waiting=waiting,
                )
            )
            return last

    def withdraw(self, waiter: Waiter) -> None:
        """The caller no longer waits. A lease granted in the meantime is given back."""
        with self._books():
            if waiter.state == "waiting":
                self._line.remove(waiter)
                waiter.state = "withdrawn"
        if waiter.lease is not None:
            self.release(waiter.lease)

    def _serve_line(self, now: float) -> list[Waiter]:
        """Grant what can be granted, the most urgent first; those no longer waiting."""
        resolved: list[Waiter] = []
        # A grant may change what is best for one passed over before: go round until none is.
        while found := self._go_down_the_line(now):
            resolved += found
        return resolved

    def _go_down_the_line(self, now: float) -> list[Waiter]:
        resolved: list[Waiter] = []
        ahead: dict[str, int] = {}
        passed_over: dict[int, int] = {}
        taken: set[tuple[str, str]] = set()
        wishes = self._line.wishes()
        for waiter in self._line.in_order(now):
            model = waiter.request.model
            before = passed_over.get(waiter.kind, 0)
            if waiter.seen is None:
                waiter.seen = Seen(now, self._nodes(), self._demand, ahead.get(model, 0))
            # Where one of a kind finds no room the next seldom does, unless it has so many
            # ahead of it that another node is sooner: look at the 1st, 2nd, 3rd, 5th, 9th ...
            is_passed_over = self._lets_others_go_first(waiter.request, waiter.since, now)
            if before & (before - 1) == 0 and not is_passed_over:
                try:
                    self._try_grant(waiter, now, ahead.get(model, 0), taken, wishes)
                except Exception as error:  # a plug-in's too: it is this waiter's alone
                    self._line.remove(waiter)
                    waiter.refuse(error)
            if waiter.state == "waiting":
                passed_over[waiter.kind] = before + 1
                ahead[model] = ahead.get(model, 0) + 1
            else:
                resolved.append(waiter)
        return resolved

    def _try_grant(
        self,
        waiter: Waiter,
        now: float,
        ahead: int,
        taken: set[tuple[str, str]],
        wishes: Mapping[str, Wish],
    ) -> None:
        request = waiter.request
        placement = self._choose(request, self._nodes(), self._demand, now, ahead)
        place = request.model, placement.node_id
        # Who needs more room than those behind is not passed by them for ever.
        if place in taken:
            return
        if not self._has_room(request, placement, now) or self._is_swap_too_early(
            request.model, waiter.wish, placement, wishes, now
        ):
            taken.add(place)
        elif not self._has_its_turn(request, placement, waiter.since, now) or (
            (ANY_MODEL, placement.node_id) in taken and request.priority < URGENT_PRIORITY
        ):
            taken.update((place, (ANY_MODEL, placement.node_id)))
        else:
            waiter.lease, waiter.state = self._book(request, placement, now), "granted"
            self._line.granted(waiter, now)

    def _try_lease(self, request: InferenceRequest, now: float) -> Lease | None:
        placement = self._choose(request, self._nodes(), self._demand, now, 0)
        wish = Wish(priority=request.priority, since=now)
        if (
            self._has_room(request, placement, now)
            and self._has_its_turn(request, placement, now, now)
            and not self._is_swap_too_early(request.model, wish, placement, {}, now)
        ):
            return self._book(request, placement, now)
        return None

    def _is_swap_too_early(
        self, model: str, wish: Wish, placement: Placement, wishes: Mapping[str, Wish], now: float
    ) -> bool:
        """
        Whether models that would be pushed out are still in use or waited for.

        With A loaded, A B A A C are two loads and not three. A load pays if it serves for longer
        than it takes: so long those may wait that need it. The most urgent ones do not.
        """
        if not placement.evicts or wish.priority == HIGHEST_PRIORITY:
            return False
        pays = SWAP_PATIENCE * placement.load_seconds
        if now - wish.since < pays:
            busy = {running.model for running in self._records[placement.node_id].running}
            if not busy.isdisjoint(placement.evicts):
                return True
        return any(
            wish.before(wishes[victim]) < pays
            for victim in placement.evicts
            if victim in wishes and victim != model
        )

    def _has_room(self, request: InferenceRequest, placement: Placement, now: float) -> bool:
        """
        Whether the runner may be handed it: without headroom if urgent and other requests come.

        What a runner has been handed goes before an urgent request, also before one for another
        model that has to push it out. That one is better off at the head of the line, from where
        it takes whichever place is free first.
        """
        record = self._records[placement.node_id]
        if not placement.has_room or not self._arrivals.are_mixed(record.installed, now):
            return placement.has_room
        slots = record.slots_of(request.model)
        # Only who is handed more than slots are known for can show that there are more.
        return slots is None or record.requests_for(request.model) < slots

    def _has_its_turn(
        self, request: InferenceRequest, placement: Placement, since: float, now: float
    ) -> bool:
        """
        Whether a GPU that urgent requests use has no other model at work.

        Two models at once take as long as one after the other. Beside an urgent request it would
        hold up that one and those behind it; and one that comes later would wait for the one model
        and run beside the other. But nobody waits for ever: others that have had no turn on the
        node for long do run beside urgent requests.
        """
        if request.priority >= URGENT_PRIORITY or placement.causes_load:
            return True
        record = self._records[placement.node_id]
        if not self._arrivals.are_urgent(record.installed, now):
            return True
        is_overdue = now - max(since, record.others_served_at) > OTHERS_TURN_SECONDS
        at_work = {
            running.model
            for running in record.running
            if running.model != request.model
            and not running.loading
            and not (is_overdue and running.priority >= URGENT_PRIORITY)
        }
        return len(at_work) < max(1, len(record.devices))

    def _book(self, request: InferenceRequest, placement: Placement, now: float) -> Lease:
        record = self._records[placement.node_id]
        peers = record.requests_for(request.model)
        generation = record.breaker.begin(now)
        load_breaker = record.load_breakers.get(request.model)
        load_generation = 0
        if load_breaker is not None:
            load_generation = (
                load_breaker.begin(now) if placement.causes_load else load_breaker.generation
            )
        lease = Lease(
            lease_id=next(self._ids),
            request=request,
            placement=placement,
            started_at=now,
            ttl=self._rules.lease_ttl,
            breaker_generation=generation,
            load_generation=load_generation,
            peers=peers,
            known_loads=frozenset(name for name, r in record.foreign.items() if r.loading),
        )
        if placement.causes_load:
            for other in record.leases.values():
                other.later_loads_seconds += placement.load_seconds
        record.leases[lease.id] = lease
        _note_turn(record, lease, now)
        _fill_slots(record, request.model, now)
        self.moves += 1
        record.note_company()
        self._publish_leases(record)
        return lease

    def first_byte(self, lease: Lease) -> bool:
        """
        The node has begun to answer. True if a load has just finished for it.

        From now on the model counts as loaded, before any probe has seen it.
        """
        with self._books() as now:
            lease.renew(now)
            record = self._records[lease.node_id]
            if not lease.is_held or not lease.running.loading:
                return False
            lease.running = replace(
                lease.running,
                loading=False,
                reserved_bytes=0,
                evicts=frozenset(),
                load_seconds=now - lease.started_at,
            )
            _fill_slots(record, lease.request.model, now)
            record.assume_loaded(lease, now)
            for other in record.neighbours:
                other.assume_loaded(lease, now)
            record.load_stuck_at = None
            breaker = record.load_breakers.get(lease.request.model)
            if breaker is not None:
                if not breaker.is_closed:
                    self._tell(
                        CircuitClosed(at=now, node_id=lease.node_id, model=lease.request.model)
                    )
                # Kept, not dropped: results of older loads must not meet a fresh circuit.
                breaker.reset()
            self._cache_index.forget(lease.node_id, lease.request.model)
            self._publish(record)
            self._count_warm_nodes()
            return True

    def release(self, lease: Lease) -> bool:
        """Give the place back; True the first time, False ever after."""
        with self._books() as now:
            return self._end(lease, "released", now)

    def abandon(self, lease: Lease) -> None:
        """
        Have a lease released soon, at the latest by the next :meth:`tick`.

        A finalizer may run in the middle of anything, in a thread that holds the lock too.
        """
        self._abandoned.append(lease)

    def _end_abandoned(self, now: float) -> None:
        while self._abandoned:
            try:
                lease = self._abandoned.popleft()
            except IndexError:  # another thread took the last one
                return
            self._end(lease, "released", now)

    def _end(self, lease: Lease, state: str, now: float) -> bool:
        if not lease.is_held:
            return False
        lease.state = "released" if state == "released" else "expired"
        record = self._records[lease.node_id]
        del record.leases[lease.id]
        _note_turn(record, lease, now)
        record.room.used(lease.request.model, now)
        _fill_slots(record, lease.request.model, now)
        self.moves += 1
        if self._others is not None:
            self._others.released(lease.request.model, now)
        record.breaker.abandon(lease.breaker_generation)
        if lease.running.loading and lease.request.model in record.load_breakers:
            record.load_breakers[lease.request.model].abandon(lease.load_generation)
        self._publish(record)
        return True

    # ---------------------------------------------------------------- outcomes

    def succeeded(self, lease: Lease, usage: Usage | None, chain: Sequence[PrefixKey] = ()) -> None:
        """The answer is complete: learn from it, and give the place back."""
        with self._books() as now:
            record = self._records[lease.node_id]
            if record.breaker.succeed(lease.breaker_generation):
                self._tell(CircuitClosed(at=now, node_id=lease.node_id))
                self._slow_start(record, now)
            if self._is_in_panic:
                self._look_for_panic(record, now)
            if usage is not None:
                self._learn(record, lease, usage, self._cached_share(lease, chain))
            self._cache_index.remember(lease.request.model, lease.node_id, chain)
            if not self._end(lease, "released", now):
                self._publish(record)

    def _demand_of(self, model: str) -> Demand:
        return self._demand.get(model) or Demand(output_tokens=self._lengths.expected(model))

    def _set_demand(self, model: str, demand: Demand) -> None:
        # Never in place: decisions work out later what they were made with.
        self._demand = {**self._demand, model: demand}

    def _slow_start(self, record: NodeRecord, now: float) -> None:
        """One good answer is not full trust: other nodes get a little head start."""
        start = self._rules.slow_start_seconds / 30.0
        record.penalty_seconds = max(start, faded(record.penalty_seconds, now - record.penalty_at))
        record.penalty_at = now

    def _cached_share(self, lease: Lease, chain: Sequence[PrefixKey]) -> int | None:
        """Tokens of its prompt that were in the cache; None where there is no telling."""
        request = lease.request
        # After a load the cache is empty for certain. And who writes no token only embeds, and
        # of that nothing is ever cached.
        if lease.placement.causes_load or request.output_tokens == 0:
            return 0
        if not chain:
            return None
        cached = request.cached_tokens.get(lease.node_id, 0)
        # What is new in a conversation of ours, nobody has had read there before.
        goes_on = 2 * cached >= chain[-1].tokens
        knows = self._cache_index.knows(request.model, lease.node_id, self._conversations_kept)
        return cached if goes_on or knows else None

    def _learn(
        self, record: NodeRecord, lease: Lease, usage: Usage, cached_tokens: int | None
    ) -> None:
        model = lease.request.model
        loaded = record.loaded.get(model)
        installed = record.installed.get(model)
        record.learner.learn(
            model,
            usage,
            caused_load=lease.placement.causes_load,
            cached_tokens=cached_tokens,
            alone=record.had_it_alone(lease),
            peers=lease.peers,
            size_bytes=installed.size_bytes if installed else 0,
            on_gpu=loaded is not None and loaded.gpu_share > 0.99,
        )
        if usage.output_tokens:
            self._lengths.add(model, usage.output_tokens)
            # One model's answers say a little of all the others' as well.
            self._demand = {
                name: replace(demand, output_tokens=self._lengths.expected(name))
                for name, demand in {model: Demand(), **self._demand}.items()
            }

    def failed(self, lease: Lease, error: NodeError) -> None:
        """The node failed this request: judge it by the cause, and give the place back."""
        with self._books() as now:
            record = self._records[lease.node_id]
            model = lease.request.model
            self._tell(AttemptFailed(at=now, node_id=lease.node_id, model=model, cause=error.cause))
            self._judge(record, lease, error, now)
            if not self._end(lease, "released", now):
                self._publish(record)

    def _judge(self, record: NodeRecord, lease: Lease, error: NodeError, now: float) -> None:
        if isinstance(error, NodeConnectError) and error.cause == "connect":
            self._set_health(record, "down", str(error), now)
        elif isinstance(error, NodeAuthError):
            self._set_health(record, "misconfigured", str(error), now)
        elif isinstance(error, ModelNotFoundError):
            installed = dict(record.installed)
            installed.pop(lease.request.model, None)
            record.installed = installed
        elif isinstance(error, NodeBusyError):
            pause = error.retry_after_seconds
            record.paused_until = now + (self._rules.pause_seconds if pause is None else pause)
            record.add_penalty(now)
        elif isinstance(error, StreamBrokenError):
            # It ended properly and only lacks its end mark: Ollama stops so when a model repeats
            # one token for ever (BEHAVIOUR section 1, rule 2). A cut connection is another error.
            pass
        elif isinstance(error, ModelLoadError) or (
            lease.running.loading and isinstance(error, NodeResponseError)
        ):
            self._load_failed(record, lease, error, now)
        else:
            self._strike(record, lease, error, now)

    def _load_failed(self, record: NodeRecord, lease: Lease, error: NodeError, now: float) -> None:
        model = lease.request.model
        breaker = record.load_breaker(model)
        # Of all that waited for one load only the first counts: it failed once.
        if breaker.fail(lease.load_generation, now, error.cause):
            self._tell(
                CircuitOpened(at=now, node_id=record.node.id, model=model, reason=error.cause)
            )
        record.loaded.pop(model, None)
        self._count_warm_nodes()

    def _strike(self, record: NodeRecord, lease: Lease, error: NodeError, now: float) -> None:
        record.add_penalty(now)
        if record.breaker.fail(
            lease.breaker_generation, now, str(error), may_open=self._may_open_one_more()
        ):
            self._tell(CircuitOpened(at=now, node_id=record.node.id, reason=error.cause))
        self._look_for_panic(record, now)

    def _look_for_panic(self, record: NodeRecord, now: float) -> None:
        was, self._is_in_panic = (
            self._is_in_panic,
            any(
                other.breaker.is_closed and other.breaker.is_suspect
                for other in self._records.values()
            ),
        )
        if self._is_in_panic and not was:
            self._tell(PanicBegan(at=now, node_id=record.node.id))
        elif was and not self._is_in_panic:
            self._tell(PanicEnded(at=now))

    def _may_open_one_more(self) -> bool:
        """
        Never eject more than half the nodes by inference alone: better a bad node than none.

        Half of those that facts leave: with all others down or cordoned, the last one stays.
        """
        left = [
            record
            for record in self._records.values()
            if record.health not in ("down", "misconfigured") and not record.cordoned_by
        ]
        open_ones = sum(1 for record in left if not record.breaker.is_closed)
        return 2 * (open_ones + 1) <= len(left)

    def may_retry(self) -> bool:
        """Whether the budget allows one more attempt; it is then paid for."""
        with self._lock:
            return self._budget.withdraw(self._clock())

    # ------------------------------------------------------------ observations

    def observe(self, seen: Observation) -> None:
        """Take in what probes have seen of a node."""
        with self._books() as now:
            record = self._records.get(seen.node_id)
            if record is None:
                return
            before = record.health
            warm_before = set(record.loaded)
            record.observe(seen)
            self._share_context(record)
            if before != record.health:
                self._health_changed(record, before, now)
            for name in record.loaded.keys() - warm_before:
                # Somebody else had it loaded: whatever of ours was cached there is gone.
                if before == "up":
                    self._cache_index.forget(record.node.id, name)
                else:
                    self._cache_index.meet(record.node.id, name)
                record.load_stuck_at = None
            self._publish(record)
            self._count_warm_nodes()

    def _share_context(self, record: NodeRecord) -> None:
        """Where one was told a context (``OLLAMA_CONTEXT_LENGTH``), others were, too, mostly."""
        found = record.told_context
        if found is None:
            return
        for other in self._records.values():
            if other.default_context is None and other.assumed_context != found:
                other.assumed_context = found
                self._publish(other)

    def _set_health(self, record: NodeRecord, health: str, reason: str, now: float) -> None:
        before = record.health
        record.health = "down" if health == "down" else "misconfigured"
        record.health_reason = reason
        record.failed_at = now
        if before != record.health:
            self._health_changed(record, before, now)
        self._count_warm_nodes()

    def _health_changed(self, record: NodeRecord, before: str, now: float) -> None:
        if record.health != "up":
            # Whatever comes back after this has empty runners, unless a probe says else.
            record.loaded = {}
        self._tell(
            NodeHealthChanged(
                at=now,
                node_id=record.node.id,
                before=before,  # type: ignore[arg-type]  # one of Health, held by the record
                after=record.health,
                reason=record.health_reason,
            )
        )

    def set_cordoned(self, node_id: str, cordoned: bool) -> None:
        """Keep new requests away from a node, or let them come again. Raises KeyError."""
        with self._books():
            self._cordon(self._records[node_id], HERE, cordoned=cordoned)

    def set_cordons(self, source: str, node_ids: Container[str]) -> None:
        """These nodes, and no others, are cordoned by what several routers have in common."""
        with self._books():
            for record in self._records.values():
                self._cordon(record, source, cordoned=record.node.id in node_ids)

    def _cordon(self, record: NodeRecord, source: str, *, cordoned: bool) -> None:
        if cordoned == (source in record.cordoned_by):
            return
        (record.cordoned_by.add if cordoned else record.cordoned_by.discard)(source)
        self._publish(record)

    def in_flight_on(self, node_id: str) -> int:
        """Requests on one node, whoever sent them. Raises KeyError."""
        with self._lock:
            return len(self._records[node_id].running)

    def tick(self) -> None:
        """Housekeeping, about once a second: expired leases, stuck loads, pauses that are over."""
        with self._books() as now:
            for record in self._records.values():
                changed = self._expire_leases(record, now)
                changed |= self._watch_loads(record, now)
                if record.paused_until is not None and now >= record.paused_until:
                    record.paused_until = None
                    changed = True
                if changed:
                    self._publish(record)
            self._refuse_the_patient(now)

    def _refuse_the_patient(self, now: float) -> None:
        """Nobody waits for longer than has been promised."""
        longest = self._rules.queue_timeout
        for waiter in [one for one in self._line if now - one.since >= longest]:
            self._line.remove(waiter)
            waiting = len(self._line)
            waiter.refuse(
                QueueFullError(
                    f"no slot was free for {longest:g} s (queue_timeout), and {waiting} more "
                    "requests wait; add a node or raise queue_timeout",
                    waiting=waiting,
                )
            )
            self._resolved.append(waiter)

    def _expire_leases(self, record: NodeRecord, now: float) -> bool:
        expired = [lease for lease in record.leases.values() if now >= lease.expires_at]
        for lease in expired:
            self._end(lease, "expired", now)
            self._tell(LeaseExpired(at=now, node_id=record.node.id, model=lease.request.model))
        return bool(expired)

    def _watch_loads(self, record: NodeRecord, now: float) -> bool:
        """
        No first byte after 3 × the predicted load + 5 s: the load path is stuck.

        Counted from when something was last seen to be loaded there, or to go.
        """
        if record.load_stuck_at is not None:
            if now - record.load_stuck_at < LOAD_STUCK_RETRY_SECONDS:
                return False
            record.load_stuck_at = None
            return True
        for lease in record.leases.values():
            running = lease.running
            if lease.called_stuck or not running.loading:
                continue
            since = max(running.started_at, record.loads_moved_at)
            if now - since > 3 * record.load_may_take(lease) + 5.0:
                lease.called_stuck = True
                record.load_stuck_at = now
                self._tell(LoadPathStuck(at=now, node_id=record.node.id, model=running.model))
                return True
        return False

    # ----------------------------------------------------------- other routers

    def share(self, tell: Callable[[], object]) -> None:
        """
        From now on there are other routers to reckon with.

        ``tell`` has them told at once of what has changed. It is called with the lock held.
        """
        with self._lock:
            self._others = Others(tell)
            for record in self._records.values():
                record.learner.share()
                record.is_shared = True

    def held(self) -> list[Lease]:
        """Every lease that is held."""
        with self._lock:
            return [lease for record in self._records.values() for lease in record.leases.values()]

    def wishes(self) -> dict[str, Wish]:
        """Who waits here, by model."""
        with self._lock:
            return self._line.wishes()

    def see_others(
        self,
        leases: Mapping[str, Mapping[str, RunningRequest]] | None,
        wishes: Mapping[str, Wish],
    ) -> list[str]:
        """
        Take in what other routers hold and want; whoever waits here may find room then.

        Args:
            leases: by node id and the lease's name; None if they are as before.
            wishes: by model.

        Returns:
            Nodes that have finished another router's load: a probe should look at them.
        """
        changed: list[str] = []
        with self._books() as now:
            if self._others is not None:
                self._others.wishes = dict(wishes)
            for node_id, foreign in (leases or {}).items():
                record = self._records.get(node_id)
                if record is None:  # a node that is about to be added
                    continue
                if _is_load_over(record.foreign, foreign):
                    changed.append(node_id)
                if foreign or record.foreign:
                    record.foreign = foreign
                    for model in {lease.request.model for lease in record.leases.values()}:
                        record.fill_slots(model, now)
                    record.note_company()
                    self._publish(record)
        return changed

    def tell(self, event: Event) -> None:
        """Hand on what has happened between the routers."""
        self._announce(event)

    def choose_again(self, lease: Lease, request: InferenceRequest) -> Lease | Waiter:
        """
        Another router was faster: give the lease back and choose again.

        In the line the request counts as waiting since it was made. Raises as
        :meth:`acquire`.
        """
        with self._books() as now:
            self._end(lease, "released", now)
            waiter = Waiter(request, min(request.submitted_at, now))
            self._line.add(waiter)
        return self._served(waiter)

    def _lets_others_go_first(self, request: InferenceRequest, since: float, now: float) -> bool:
        if self._others is None:
            return False
        own = Wish(priority=request.priority, since=since)
        return self._others.go_first(own, request.model, now)

    def samples(self) -> list[Sample]:
        """What other routers are to be told of the nodes' rates; each is given once."""
        with self._lock:
            return [one for record in self._records.values() for one in record.samples()]

    def adopt(self, rates: Mapping[str, Mapping[str, Rate]]) -> list[Seed]:
        """Go on from what all routers have measured, by node id; see :mod:`.rates`."""
        seeds: list[Seed] = []
        with self._books():
            for node_id, theirs in rates.items():
                record = self._records.get(node_id)
                if record is not None:  # else it is about to be added
                    seeds += record.adopt(theirs)
                    self._publish(record)
        return seeds

    # ------------------------------------------------------- from start to start

    def recall(self, node_id: str, kept: Mapping[str, Mapping[str, Rate]]) -> None:
        """Begin with what earlier routers have learned of a node, by digest."""
        with self._books():
            record = self._records.get(node_id)
            if record is not None:
                record.recall(kept)
                self._publish(record)

    def learned(self, timeout_seconds: float) -> dict[tuple[str, str], dict[str, Rate]] | None:
        """What is worth keeping, by node URL and digest; None if the lock is not free in time."""
        if not self._lock.acquire(timeout=timeout_seconds):
            return None
        try:
            return {
                (record.node.url, digest): rates
                for record in self._records.values()
                for digest, rates in record.learned().items()
            }
        finally:
            self._lock.release()

    # ------------------------------------------------------------------ demand

    def cached_tokens(self, model: str, chain: Sequence[PrefixKey]) -> dict[str, int]:
        """Prompt tokens expected in each node's cache, by node id."""
        if not chain:
            return {}
        with self._lock:
            return self._cache_index.cached_tokens(model, chain, self._conversations_kept)

    def _conversations_kept(self, node_id: str) -> int:
        return CONVERSATIONS_KEPT if _keeps_prompts(self._records[node_id].version) else 1

    def _count_arrival(self, request: InferenceRequest, now: float) -> None:
        self._budget.deposit(now)
        self._arrivals.note(request, now)
        before = self._demand_of(request.model)
        if self._counted_since is None:
            self._counted_since = now
        self._set_demand(
            request.model,
            replace(
                before,
                per_second=before.faded(now) + 1.0 / DEMAND_MEMORY_SECONDS,
                seen_at=now,
                counted_since=self._counted_since,
            ),
        )

    def _count_warm_nodes(self) -> None:
        """Bring the demand table up to date after a change of what is loaded where."""
        warm: dict[str, int] = {}
        for record in self._records.values():
            for name in record.loaded:
                warm[name] = warm.get(name, 0) + 1
        for name in warm.keys() | self._demand.keys():
            before = self._demand_of(name)
            if before.warm_nodes != warm.get(name, 0):
                self._set_demand(name, replace(before, warm_nodes=warm.get(name, 0)))

    def _tell(self, event: Event) -> None:
        self._outbox.append(event)

    def __repr__(self) -> str:
        nodes: Iterable[NodeSnapshot] = self.nodes()
        up = sum(1 for node in nodes if node.health == "up")
        return f"<Cluster {up}/{len(self._records)} nodes up, {self.in_flight} in flight>"


def _fill_slots(record: NodeRecord, model: str, now: float) -> None:
    for one in (record, *record.neighbours):
        one.fill_slots(model, now)


def _note_turn(record: NodeRecord, lease: Lease, now: float) -> None:
    """A lease begins or ends there."""
    if lease.request.priority < URGENT_PRIORITY:
        record.others_served_at = now


def _is_load_over(
    before: Mapping[str, RunningRequest], after: Mapping[str, RunningRequest]
) -> bool:
    return any(
        running.loading and not (name in after and after[name].loading)
        for name, running in before.items()
    )


@lru_cache(maxsize=64)
def _keeps_prompts(version: str | None) -> bool:
    """Whether the runner restores earlier prompts: Ollama >= 0.30."""
    numbers = numbers_of(version)
    return numbers is not None and numbers >= (0, 30, 0)
