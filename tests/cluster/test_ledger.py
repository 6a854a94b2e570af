"""The ledger under everything that can happen to a request, beside a plain dictionary."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hydra_llm.cluster import Lease, Waiter
from hydra_llm.events import CircuitClosed, CircuitOpened, Event, LeaseExpired
from hydra_llm.exceptions import (
    ModelLoadError,
    ModelNotFoundError,
    NodeAuthError,
    NodeBusyError,
    NodeConnectError,
    NodeError,
    NodeProtocolError,
    NodeResponseError,
    NodeTimeoutError,
    NoEligibleNodeError,
    QueueFullError,
    StreamBrokenError,
)
from hydra_llm.scheduling import Scheduler
from hydra_llm.scheduling.scheduler import NEAR_TIE_SECONDS, NEAR_TIE_SHARE, Choice
from hydra_llm.types import (
    Demand,
    InferenceRequest,
    NodeSnapshot,
    Placement,
    RunnerOptions,
    Usage,
)
from tests.cluster.ledgers import Clock, failure, ledger, node, placing, seen
from tests.helpers import BIG, LLAMA, request

QWEN = "qwen3:8b"
LEASE_TTL = 20
MAX_QUEUE = 5
QUEUE_TIMEOUT = 60
SLOTS = {"a": 1, "b": 2, "c": 1, "d": 1}
MODELS = {"a": (LLAMA, QWEN, BIG), "b": (LLAMA, QWEN, BIG), "c": (LLAMA, QWEN), "d": (LLAMA,)}
TOTAL_GB = {"a": 24.0, "b": 24.0, "c": 12.0, "d": None}
HEADROOM = {1: 0, 3: 0, 4: 1, 5: 1, 7: 1, 8: 2, 10: 2}

FAILURES: dict[type[NodeError], dict[str, Any]] = {
    NodeConnectError: {},
    NodeAuthError: {},
    NodeTimeoutError: {},
    NodeBusyError: {"status_code": 503, "retry_after_seconds": 2.0},
    NodeResponseError: {"status_code": 500},
    ModelNotFoundError: {"status_code": 404},
    ModelLoadError: {"status_code": 500},
    NodeProtocolError: {},
    StreamBrokenError: {"parts": 1},
}

NODE_IDS = st.sampled_from(sorted(SLOTS))
REQUESTS = st.builds(
    request,
    model=st.sampled_from([LLAMA, LLAMA, QWEN, BIG]),
    priority=st.sampled_from([1, 5, 5, 10]),
    node_id=st.sampled_from([None, None, None, "a", "b"]),
    strict_pin=st.booleans(),
    options=st.sampled_from(
        [RunnerOptions(), RunnerOptions(num_ctx=4096), RunnerOptions(num_ctx=8192)]
    ),
    output_tokens=st.sampled_from([None, 10]),
    deadline_seconds=st.sampled_from([None, None, 40.0]),
)


@dataclass(eq=False)
class Job:
    """One request as its caller sees it."""

    request: InferenceRequest
    nodes: list[str] = field(default_factory=list)
    lease: Lease | None = None
    renewed_at: float = 0.0
    has_answered: bool = False
    is_probe: bool = False
    waiter: Waiter | None = None
    times_woken: int = 0

    def woken(self) -> None:
        self.times_woken += 1


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler = Scheduler()
        self.real_choose = placing(self.scheduler, random.Random(0))
        self.events: list[Event] = []
        self.cluster = ledger(
            clock=self.clock,
            nodes=[node(id_, slots=slots) for id_, slots in SLOTS.items()],
            choose=self.choose,
            on_event=self.listen,
            breaker_failures=2,
            lease_ttl=float(LEASE_TTL),
            max_queue=MAX_QUEUE,
            queue_timeout=float(QUEUE_TIMEOUT),
        )
        for id_ in sorted(SLOTS):
            self.cluster.observe(seen(id_, models=MODELS[id_], total_gb=TOTAL_GB[id_]))
        self.held: dict[int, Job] = {}
        self.line: list[Job] = []
        self.came: dict[tuple[str, bool], float] = {}
        """When each model was last asked for, by whether that was urgent."""
        self.others_served_at: dict[str, float] = {}
        """When each node last had a request that was not urgent begin or end."""
        self.expired: list[Job] = []
        self.ended: list[Lease] = []
        self.through_open_circuits: set[tuple[str, int]] = set()
        self.is_settled = True
        self.ticked_at = 0.0

    # --------------------------------------------------- between ledger and scheduler

    def choose(
        self,
        asked: InferenceRequest,
        nodes: Sequence[NodeSnapshot],
        demand: Mapping[str, Demand],
        now: float,
        queue_ahead: int,
    ) -> Placement:
        placement = self.real_choose(asked, nodes, demand, now, queue_ahead)
        chosen = next(n for n in nodes if n.id == placement.node_id)
        assert chosen.health == "up"
        assert not chosen.cordoned
        if placement.has_room:
            mine = sum(1 for running in chosen.running if running.model == asked.model)
            assert mine < SLOTS[chosen.id] + headroom(asked.priority)
            assert asked.model not in chosen.leaving
        return placement

    def listen(self, event: Event) -> None:
        # Would hang for ever if events were told under the lock.
        self.cluster.nodes()
        self.events.append(event)

    # ---------------------------------------------------------------- what jobs do

    def go(self, job: Job) -> None:
        open_before = self.open_circuits()
        if not job.request.tried:
            self.came[job.request.model, job.request.priority >= 8] = self.clock.now
        try:
            held = self.cluster.acquire(job.request)
        except NoEligibleNodeError as error:
            self.refused(error)
        except QueueFullError:
            assert len(self.line) >= MAX_QUEUE
        else:
            if isinstance(held, Lease):
                self.take(job, held, open_before)
            else:
                # One may have been granted in this very step, and left its place to this one.
                assert (
                    sum(j.waiter is not None and j.waiter.state == "waiting" for j in self.line)
                    < MAX_QUEUE
                )
                job.waiter = held
                held.on_ready(job.woken)
                self.line.append(job)
        self.collect(open_before)

    def take(self, job: Job, lease: Lease, open_before: set[str]) -> None:
        assert lease.is_held
        assert lease.id not in self.held
        assert lease.node_id not in job.nodes, "the same node twice for one request"
        job.nodes.append(lease.node_id)
        job.lease, job.renewed_at, job.has_answered = lease, self.clock.now, False
        job.is_probe = lease.node_id in open_before
        self.held[lease.id] = job
        self.note_turn(lease)

    def note_turn(self, lease: Lease) -> None:
        if lease.request.priority < 8:
            self.others_served_at[lease.node_id] = self.clock.now

    def collect(self, open_before: set[str]) -> None:
        """Those whose waiting is over: woken once, and granted or refused."""
        self.is_settled = True
        for job in list(self.line):
            waiter = job.waiter
            assert waiter is not None
            if waiter.state == "waiting":
                assert job.times_woken == 0
                continue
            assert job.times_woken == 1
            self.line.remove(job)
            job.waiter, job.times_woken = None, 0
            if waiter.state == "granted":
                assert waiter.lease is not None
                assert waiter.error is None
                self.take(job, waiter.lease, open_before)
            else:
                assert waiter.state == "refused"
                assert waiter.lease is None
                self.refused(waiter.error)

    def refused(self, error: Exception | None) -> None:
        if isinstance(error, QueueFullError):
            assert error.waiting == MAX_QUEUE or "queue_timeout" in str(error)
            return
        assert isinstance(error, NoEligibleNodeError)
        assert {r.node_id for r in error.rejections} == set(SLOTS)

    def open_circuits(self) -> set[str]:
        return {n.id for n in self.cluster.nodes() if n.circuit == "open"}

    def end(self, job: Job) -> Lease:
        assert job.lease is not None
        lease = job.lease
        del self.held[lease.id]
        self.ended.append(lease)
        self.note_turn(lease)
        return lease

    def some(self, data: st.DataObject, jobs: Sequence[Job]) -> Job:
        return data.draw(st.sampled_from(jobs))

    @rule(burst=st.lists(REQUESTS, min_size=1, max_size=6))
    def acquire(self, burst: list[InferenceRequest]) -> None:
        for asked in burst:
            self.go(Job(replace(asked, submitted_at=self.clock.now)))

    @rule(asked=REQUESTS, count=st.integers(2, 6))
    def acquire_the_same(self, asked: InferenceRequest, count: int) -> None:
        for _ in range(count):
            self.go(Job(replace(asked, submitted_at=self.clock.now)))

    @rule(asked=REQUESTS)
    def look_without_booking(self, asked: InferenceRequest) -> None:
        before = self.cluster.nodes()
        with suppress(NoEligibleNodeError):
            self.cluster.preview(asked)
        assert self.cluster.nodes() is before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def first_byte(self, data: st.DataObject) -> None:
        job, before = self.some(data, list(self.held.values())), self.open_circuits()
        assert job.lease is not None
        was_loading = job.lease.running.loading

        assert self.cluster.first_byte(job.lease) == was_loading

        job.renewed_at, job.has_answered = self.clock.now, True
        self.collect(before)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        job = self.some(data, list(self.held.values()))
        assert job.lease is not None
        job.lease.renew(self.clock.now)
        job.renewed_at = self.clock.now

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.sampled_from([None, 20, 400]))
    def succeed(self, data: st.DataObject, tokens: int | None) -> None:
        job, before = self.some(data, list(self.held.values())), self.open_circuits()
        lease = self.end(job)
        usage = Usage(
            total_seconds=3.0,
            load_seconds=0.005,
            prefill_seconds=0.5,
            decode_seconds=2.0,
            prompt_tokens=100,
            output_tokens=tokens,
        )
        self.cluster.first_byte(lease)
        self.cluster.succeeded(lease, usage if tokens else None)
        self.collect(before)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), kind=st.sampled_from(list(FAILURES)), tries_again=st.booleans())
    def fail(self, data: st.DataObject, kind: type[NodeError], tries_again: bool) -> None:
        self.fail_job(self.some(data, list(self.held.values())), kind, tries_again)

    @precondition(lambda self: self.held)
    @rule(node_id=NODE_IDS, kind=st.sampled_from([NodeTimeoutError, ModelLoadError]))
    def fail_all_on(self, node_id: str, kind: type[NodeError]) -> None:
        for job in [j for j in self.held.values() if j.nodes[-1] == node_id]:
            self.fail_job(job, kind, True)

    def fail_job(self, job: Job, kind: type[NodeError], tries_again: bool) -> None:
        before = self.open_circuits()
        lease = self.end(job)
        self.cluster.failed(lease, failure(kind, lease.node_id, **FAILURES[kind]))
        self.collect(before)
        if tries_again and not job.has_answered:
            job.request = replace(job.request, tried=job.request.tried | {lease.node_id})
            self.go(job)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job, before = self.some(data, list(self.held.values())), self.open_circuits()
        assert self.cluster.release(self.end(job))
        self.collect(before)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        before = self.open_circuits()
        assert not self.cluster.release(data.draw(st.sampled_from(self.ended)))
        self.collect(before)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        job, before = self.some(data, self.line), self.open_circuits()
        assert job.waiter is not None
        self.line.remove(job)
        self.cluster.withdraw(job.waiter)
        if job.waiter.lease is not None:  # its turn came because time had passed
            self.ended.append(job.waiter.lease)
            self.note_turn(job.waiter.lease)
        self.cluster.withdraw(job.waiter)
        assert job.waiter.state in ("withdrawn", "granted", "refused")
        self.collect(before)

    # -------------------------------------------------------------- what time does

    @rule(seconds=st.sampled_from([1, 2, 5, 15, LEASE_TTL]))
    def wait_for_the_next_tick(self, seconds: int) -> None:
        self.clock.now += seconds
        due = [j for j in self.held.values() if self.clock.now >= j.renewed_at + LEASE_TTL]
        told = Counter(type(event) for event in self.events)[LeaseExpired]
        before = self.open_circuits()

        self.cluster.tick()
        self.ticked_at = self.clock.now

        for job in due:
            assert job.lease is not None
            assert job.lease.state == "expired"
            self.end(job)
            self.expired.append(job)
        assert all(j.lease is not None and j.lease.is_held for j in self.held.values())
        assert Counter(type(event) for event in self.events)[LeaseExpired] == told + len(due)
        self.collect(before)

    @rule(seconds=st.integers(1, 3))
    def wait_unnoticed(self, seconds: int) -> None:
        self.clock.now += seconds
        self.is_settled = False

    @precondition(lambda self: self.expired)
    @rule(ending=st.sampled_from(["succeeded", "failed", "released"]))
    def come_back_after_expiry(self, ending: str) -> None:
        lease, before = self.expired.pop().lease, self.open_circuits()
        assert lease is not None
        if ending == "succeeded":
            self.cluster.first_byte(lease)
            self.cluster.succeeded(lease, None)
        elif ending == "failed":
            self.cluster.failed(lease, failure(NodeTimeoutError, lease.node_id))
        else:
            assert not self.cluster.release(lease)
        assert lease.state == "expired"
        self.collect(before)

    # ---------------------------------------------------------------- what nodes do

    @rule(
        node_id=NODE_IDS,
        warm=st.sets(st.sampled_from([LLAMA, QWEN, BIG]), max_size=2),
        age=st.sampled_from([0, 0, 4]),
    )
    def see_it_up(self, node_id: str, warm: set[str], age: int) -> None:
        before = self.open_circuits()
        here = [model for model in sorted(warm) if model in MODELS[node_id]]
        self.cluster.observe(
            seen(
                node_id,
                at=self.clock.now - age,
                models=MODELS[node_id],
                warm=here,
                total_gb=TOTAL_GB[node_id],
            )
        )
        self.collect(before)

    @rule(node_id=NODE_IDS, trouble=st.sampled_from(["down", "misconfigured", "cordoned"]))
    def trouble(self, node_id: str, trouble: str) -> None:
        before = self.open_circuits()
        if trouble == "cordoned":
            self.cluster.set_cordoned(node_id, True)
        else:
            self.cluster.observe(seen(node_id, at=self.clock.now, health=trouble))
        self.collect(before)

    @precondition(lambda self: self.open_circuits())
    @rule(asked=REQUESTS)
    def come_back_to_an_open_circuit(self, asked: InferenceRequest) -> None:
        for snapshot in self.cluster.nodes():
            if snapshot.circuit == "open" and snapshot.circuit_retry_at is not None:
                left = snapshot.circuit_retry_at - self.clock.now
                self.wait_for_the_next_tick(max(0, math.ceil(left)))
                self.see_it_up(snapshot.id, {LLAMA}, 0)
                before = self.open_circuits()
                self.cluster.set_cordoned(snapshot.id, False)
                self.collect(before)
                pinned = replace(asked, model=LLAMA, node_id=snapshot.id, strict_pin=True)
                self.acquire([pinned, pinned])
                return

    @rule(warm=st.sets(st.sampled_from([LLAMA, QWEN, BIG]), max_size=2))
    def repair(self, warm: set[str]) -> None:
        for node_id in sorted(SLOTS):
            self.see_it_up(node_id, warm, 0)
            before = self.open_circuits()
            self.cluster.set_cordoned(node_id, False)
            self.collect(before)

    # ------------------------------------------------------------------ what holds

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.cluster.in_flight == len(self.held)
        assert self.cluster.waiting == len(self.line)
        assert all(job.times_woken == 0 for job in self.line)
        for snapshot in self.cluster.nodes():
            here = [j for j in self.held.values() if j.nodes[-1] == snapshot.id]
            assert {r.lease_id for r in snapshot.running} == {
                j.lease.id for j in here if j.lease is not None
            }
            by_model = Counter(r.model for r in snapshot.running)
            assert all(count <= SLOTS[snapshot.id] + 2 for count in by_model.values())

    @invariant()
    def memory_is_reserved_exactly_while_a_load_is_pending(self) -> None:
        for snapshot in self.cluster.nodes():
            pending = [
                job.lease.placement
                for job in self.held.values()
                if job.nodes[-1] == snapshot.id
                and job.lease is not None
                and job.lease.placement.causes_load
                and not job.has_answered
            ]
            assert snapshot.reserved_bytes == sum(p.reserved_bytes for p in pending)
            assert snapshot.leaving == frozenset().union(*(p.evicts for p in pending))
            assert (snapshot.free_vram_bytes or 0) >= 0

    @invariant()
    def one_request_at_most_is_let_through_an_open_circuit(self) -> None:
        still_open = self.open_circuits()
        probes = Counter(
            job.nodes[-1]
            for job in self.held.values()
            if job.is_probe and job.nodes[-1] in still_open
        )
        assert all(count == 1 for count in probes.values())

    @invariant()
    def inference_alone_ejects_no_more_than_half_the_nodes(self) -> None:
        assert 2 * len(self.open_circuits()) <= len(SLOTS)

    @invariant()
    def circuits_open_and_close_in_turns(self) -> None:
        states: dict[tuple[str, str | None], bool] = {}
        for event in self.events:
            if isinstance(event, CircuitClosed):
                assert states.get((event.node_id, event.model))
                states[event.node_id, event.model] = False
            elif isinstance(event, CircuitOpened):
                states[event.node_id, event.model] = True
        told_open = {id_ for (id_, model), is_open in states.items() if model is None and is_open}
        assert told_open == self.open_circuits()

    @invariant()
    def the_demand_table_knows_how_many_nodes_are_warm(self) -> None:
        warm = Counter(name for snapshot in self.cluster.nodes() for name in snapshot.loaded)
        told = {name: d.warm_nodes for name, d in self.cluster.demand().items() if d.warm_nodes}
        assert told == warm

    @invariant()
    def nobody_waits_while_there_is_room(self) -> None:
        if not self.is_settled:
            return
        nodes, demand, now = self.cluster.nodes(), self.cluster.demand(), self.clock.now
        look = placing(self.scheduler, random.Random(1))
        ahead: Counter[str] = Counter()
        taken: set[tuple[str, str]] = set()
        awaited: set[str] = set()
        """Nodes on which somebody waits for their turn, and others like that behind them."""
        for job in sorted(self.line, key=place_in_line):
            asked = job.request
            # With at most five, all are looked at but the fourth of a kind.
            if ahead[asked.model] < 3:
                placement = look(asked, nodes, demand, now, ahead[asked.model])
                place = asked.model, placement.node_id
                # Of several as good the ledger may have drawn one that holds it back.
                is_drawn = len(near_ties(placement)) > 1
                if placement.has_room and place not in taken and not is_drawn:
                    chosen = next(n for n in nodes if n.id == placement.node_id)
                    is_behind = asked.priority < 8 and chosen.id in awaited
                    assert is_behind or self.is_held_back(job, placement, chosen)
                    if self.has_no_turn(job, placement, chosen):
                        awaited.add(chosen.id)
                taken.add(place)
            ahead[asked.model] += 1

    def is_held_back(self, job: Job, placement: Placement, chosen: NodeSnapshot) -> bool:
        """Whether it has to wait although its node has room for it."""
        asked = job.request
        others = [r for r in chosen.running if r.model != asked.model]
        is_mixed = self.lately(chosen, True) and self.lately(chosen, False)
        if is_mixed and len(chosen.running) - len(others) >= SLOTS[chosen.id]:
            return True
        if placement.causes_load:
            wanted = {other.request.model for other in self.line if other is not job}
            wanted |= {running.model for running in chosen.running}
            return asked.priority < 10 and bool(placement.evicts & wanted)
        return self.has_no_turn(job, placement, chosen)

    def has_no_turn(self, job: Job, placement: Placement, chosen: NodeSnapshot) -> bool:
        """Whether another model is at work already where urgent requests come."""
        asked = job.request
        if asked.priority >= 8 or placement.causes_load:
            return False
        others = [r for r in chosen.running if r.model != asked.model]
        served_at = self.others_served_at.get(chosen.id, -math.inf)
        # Urgent ones are run beside after a while.
        is_overdue = self.clock.now - max(since(job), served_at) > 15
        is_held = any(r.priority < 8 or not is_overdue for r in others)
        return is_held and self.lately(chosen, True)

    def lately(self, chosen: NodeSnapshot, is_urgent: bool) -> bool:
        """Whether such requests have come for any model that the node has."""
        asked_at = [self.came.get((name, is_urgent), -math.inf) for name in chosen.installed]
        return self.clock.now - max(asked_at, default=-math.inf) <= 300

    @invariant()
    def nobody_waits_longer_than_is_promised(self) -> None:
        assert all(self.ticked_at - since(job) < QUEUE_TIMEOUT for job in self.line)

    def teardown(self) -> None:
        while self.held or self.line:
            for job in list(self.held.values()):
                assert self.cluster.release(self.end(job))
                self.collect(self.open_circuits())
            for job in list(self.line):
                if job in self.line and job.waiter is not None:
                    self.line.remove(job)
                    self.cluster.withdraw(job.waiter)
                    if job.waiter.lease is not None:
                        self.ended.append(job.waiter.lease)
                    self.collect(self.open_circuits())
        assert self.cluster.in_flight == 0
        assert self.cluster.waiting == 0
        for snapshot in self.cluster.nodes():
            assert snapshot.running == ()
            assert snapshot.reserved_bytes == 0
            assert snapshot.free_vram_bytes == snapshot.measured_free_vram_bytes
        assert not any(lease.is_held for lease in self.ended)


def headroom(priority: int) -> int:
    """None below 4, two from 8 on."""
    return 0 if priority < 4 else 1 if priority < 8 else 2


def near_ties(placement: Placement) -> list[str]:
    """The nodes of which the scheduler drew one."""
    assert isinstance(placement.choice, Choice)
    costs = {one.node_id: one.total_seconds for one in placement.choice.candidates()}
    best = min(costs.values())
    bar = best + max(NEAR_TIE_SHARE * best, NEAR_TIE_SECONDS)
    return [node_id for node_id, seconds in costs.items() if seconds <= bar]


def place_in_line(job: Job) -> tuple[bool, float, float]:
    """The highest first; 15 seconds make up for a step of priority."""
    priority = job.request.priority
    return priority < 10, since(job) - 15.0 * priority, since(job)


def since(job: Job) -> float:
    assert job.waiter is not None
    return job.waiter.since


TestLedgerBesideItsModel = LedgerMachine.TestCase
TestLedgerBesideItsModel.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, derandomize=True
)
