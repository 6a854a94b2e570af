"""A soak: random requests, random faults, and a judge; in virtual time or over sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra_llm import AsyncClient, HydraSettings, Router
from hydra_llm.events import Event
from hydra_llm.simulation.catalog import known_models
from hydra_llm.testing import (
    Behaviour,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
    VirtualCluster,
)
from tests.soak.callers import EMBEDDER, MODELS, Asked, ask_with_patience, draw, script
from tests.soak.promises import SECRET, Judge, LogWatch
from tests.soak.troubles import Illness, Trouble, drawn

__all__ = ["REAL", "VIRTUAL", "Pace", "Report", "soak_for_real", "soak_in_virtual_time"]

LEARNS = "c"
"""The node whose slots the router is not told. What it learns may be too many for a while: where
one answer ends just as the next comes, both seem to have run at once."""
LEARNED_TOO_MANY = 2
HEADROOM = 2
"""Requests that a runner is handed beyond its slots at the most (docs: by priority)."""
RETRY_FLOOR = 20
STUCK_TAIL_S = 62.0
"""A load path that looks stuck is tried again after a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast everything goes; seconds unless the name says otherwise."""

    requests_per_second: float
    burst_every: float
    trouble_every: float
    trouble_lasts: float
    hurry: float = 1.0
    """Divides the callers' seconds."""
    speed: float = 1.0
    """Of the nodes."""
    patience: float
    tail: float
    """For which any trouble may be felt after its end: circuits, probes."""
    hang_tail: float
    """As much again for requests that hang until a time limit."""
    settings: dict[str, Any] = field(default_factory=dict)


VIRTUAL = Pace(
    requests_per_second=0.25,
    burst_every=600.0,
    trouble_every=150.0,
    trouble_lasts=60.0,
    patience=300.0,
    tail=130.0,
    hang_tail=70.0,
    settings={
        "health_check_interval": 10.0,
        "breaker_open_seconds": 2.0,
        "breaker_max_open_seconds": 20.0,
        "connect_timeout": 2.0,
        "first_byte_timeout": 40.0,
        "whole_answer_timeout": 60.0,
        "stream_idle_timeout": 20.0,
        "max_body_bytes": 1_000_000,
        "retry_floor": RETRY_FLOOR,
    },
)
REAL = replace(
    VIRTUAL,
    requests_per_second=4.0,
    burst_every=30.0,
    trouble_every=12.0,
    trouble_lasts=5.0,
    hurry=10.0,
    speed=20.0,
    patience=60.0,
    tail=15.0,
    hang_tail=10.0,
    settings={
        "health_check_interval": 1.0,
        "health_check_timeout": 1.0,
        "breaker_open_seconds": 0.2,
        "breaker_max_open_seconds": 2.0,
        "connect_timeout": 1.0,
        "first_byte_timeout": 5.0,
        "whole_answer_timeout": 8.0,
        "stream_idle_timeout": 3.0,
        "max_body_bytes": 1_000_000,
        "retry_floor": RETRY_FLOOR,
    },
)


@dataclass(slots=True, kw_only=True)
class Report:
    """What a soak has found."""

    seed: int
    seconds: float
    """Of the soak's own time."""
    real_seconds: float
    requests: int
    attempts: int
    decisions: int
    troubles: int
    loads: int
    log_lines: int
    outcomes: dict[str, int]
    broken: list[str]
    rss_mb: list[float]
    """At times spread evenly, first to last."""
    objects: list[int]
    """That the garbage collector knows, at the same times."""

    @property
    def is_good(self) -> bool:
        """Whether every promise was kept."""
        return not self.broken

    def text(self) -> str:
        """As a person reads it."""
        outcomes = ", ".join(f"{count} {name}" for name, count in self.outcomes.items())
        lines = [
            f"seed {self.seed}: {self.seconds / 3600:.2f} hours in {self.real_seconds:.0f} s",
            f"{self.requests} requests ({self.requests / max(self.real_seconds, 1e-9):.0f} a real "
            f"second): {outcomes}",
            f"{self.attempts} attempts, {self.decisions} decisions, {self.troubles} troubles, "
            f"{self.loads} loads, {self.log_lines} lines of log",
            f"memory: {', '.join(f'{mb:.0f}' for mb in self.rss_mb)} MB; "
            f"objects: {', '.join(f'{count // 1000}k' for count in self.objects)}",
            *(f"BROKEN: {what}" for what in self.broken),
            "every promise was kept" if self.is_good else "promises were broken",
        ]
        return "\n".join(lines)


# ------------------------------------------------------------------------- the nodes

SHAPES: tuple[tuple[str, float, int, tuple[str, ...]], ...] = (
    ("a", 24.0, 2, tuple(MODELS)),
    ("b", 16.0, 1, tuple(MODELS)),
    ("c", 12.0, 2, ("llama3.2:3b", "qwen3:8b", "gemma3:12b")),
    ("d", 8.0, 1, ("llama3.2:3b", "qwen3:8b")),
)
"""Names, GB of VRAM, slots and models: the models of a node do not all fit at once."""


def _model(name: str, node_id: str) -> SimulatedModel:
    known = known_models()[name]
    if name == EMBEDDER:
        return known
    return replace(known, behaviour=Behaviour("script", tokens=script(node_id)))


def make_nodes(seed: int, pace: Pace) -> list[SimulatedNode]:
    """Four nodes, without the time of a start."""
    return [
        SimulatedNode(
            node_id,
            models=[_model(name, node_id) for name in (*models, EMBEDDER)],
            vram_gb=vram_gb,
            num_parallel=parallel,
            # An unset context would be 32,768 tokens on 24 GB.
            default_num_ctx=4096,
            keep_alive_s=300.0,
            speed=pace.speed,
            seed=seed,
            keep_requests=500,
        )
        for node_id, vram_gb, parallel, models in SHAPES
    ]


# ------------------------------------------------------------------------- the soak


class Soak:
    """
    One run.

    Args:
        nodes: the simulated ones.
        router: over them.
        judge: who looks at what comes of it.
        pace: how fast everything goes.
        seed: of all that is drawn.
        clock: the world's.
        say: told how it goes, now and then.
    """

    def __init__(
        self,
        nodes: list[SimulatedNode],
        router: Router,
        judge: Judge,
        *,
        pace: Pace,
        seed: int,
        clock: Callable[[], float],
        say: Callable[[str], object],
    ) -> None:
        self.nodes = nodes
        self.router = router
        self.judge = judge
        self.pace = pace
        self.clock = clock
        self.say = say
        self.rss_mb: list[float] = []
        self.objects: list[int] = []
        self.troubles = 0
        self._number = 0
        self._requests = random.Random(f"requests {seed}")
        self._faults = random.Random(f"faults {seed}")
        self._under_way: dict[asyncio.Task[None], Asked] = {}
        self._ill: dict[str, Illness] = {}
        self._storm = 1.0

    async def run(self, seconds: float) -> None:
        """Soak, come to rest, and look whether all is well again."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unhandled)
        await self.router.await_until_seen()
        tasks = len(asyncio.all_tasks())
        began = self.clock()
        client = AsyncClient(router=self.router)
        callers = asyncio.ensure_future(self._callers(client, began + seconds))
        troubles = asyncio.ensure_future(self._troubles(began + seconds))
        for part in range(1, 13):
            await asyncio.sleep(max(0.0, began + seconds * part / 12 - self.clock()))
            self._measure()
            counts = self.judge.outcomes
            self.say(
                f"{part}/12: {self._number} requests, {self.troubles} troubles, "
                f"{counts['promises broken']} promises broken, {self.rss_mb[-1]:.0f} MB"
            )
        await callers
        troubles.cancel()
        await asyncio.wait([troubles])
        while self._under_way:
            await asyncio.wait(self._under_way)
        await self._rest(client, tasks)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.judge.tell(f"nobody caught: {context.get('message')} {type(error).__name__} {error}")

    def _measure(self) -> None:
        gc.collect()
        # What the simulated nodes remember of their loads is no leak of the router's.
        records = sum(len(node.loads) + len(node.evictions) for node in self.nodes)
        self.objects.append(len(gc.get_objects()) - records)
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        self.rss_mb.append(pages * 4096 / 1e6)

    # ------------------------------------------------------------------ requests

    async def _callers(self, client: AsyncClient, until: float) -> None:
        rng, pace = self._requests, self.pace
        next_burst = self.clock() + rng.expovariate(1.0 / pace.burst_every)
        while self.clock() < until:
            await asyncio.sleep(rng.expovariate(pace.requests_per_second * self._storm))
            count = 1
            if self.clock() >= next_burst:
                next_burst = self.clock() + rng.expovariate(1.0 / pace.burst_every)
                count = rng.randint(10, 40)
            for _ in range(count):
                self._begin(client)

    def _begin(self, client: AsyncClient) -> None:
        ids = [node.id for node in self.nodes]
        asked = draw(self._requests, self._number, ids, self.pace.hurry)
        self._number += 1
        asked.began = self.clock()
        task = asyncio.ensure_future(ask_with_patience(client, asked, self.pace.patience))
        self._under_way[task] = asked
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        asked = self._under_way.pop(task)
        asked.ended = self.clock()
        if not task.cancelled() and task.exception() is not None:
            asked.error = task.exception()
        self.judge.answered(asked)
        # An error holds the frames that it came through, and they the request.
        asked.error = asked.broken = None

    # ------------------------------------------------------------------ troubles

    async def _troubles(self, until: float) -> None:
        rng, pace = self._faults, self.pace
        running: set[asyncio.Task[None]] = set()
        try:
            while self.clock() < until:
                await asyncio.sleep(rng.expovariate(1.0 / pace.trouble_every))
                oldest = min((a.began for a in self._under_way.values()), default=self.clock())
                self.judge.forget(oldest)
                trouble, seconds = drawn(rng), rng.expovariate(1.0 / pace.trouble_lasts)
                struck = [rng.choice(self.nodes)]
                if rng.random() < 0.06:
                    struck = list(self.nodes)
                for node in struck:
                    if node.id not in self._ill:
                        task = asyncio.ensure_future(self._have(node, trouble, seconds))
                        running.add(task)
                        task.add_done_callback(running.discard)
                        await asyncio.sleep(0)
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def _have(self, node: SimulatedNode, trouble: Trouble, seconds: float) -> None:
        pace = self.pace
        self.troubles += 1
        illness = self._ill[node.id] = Illness(trouble, node.id, self.clock())
        tail = pace.tail + pace.hang_tail * trouble.hangs + STUCK_TAIL_S * trouble.sticks
        self.judge.illnesses.append((illness, tail))
        try:
            with suppress(RuntimeError):  # what is to be loaded is busy, or has no room
                trouble.begin(node, self.router)
            await asyncio.sleep(seconds)
        finally:
            trouble.end(node, self.router)
            illness.ended = self.clock()
            del self._ill[node.id]

    # ------------------------------------------------------------------ at rest

    async def _rest(self, client: AsyncClient, tasks: int) -> None:
        """Everything ends, is well again, and leaves nothing behind."""
        judge, router = self.judge, self.router
        gc.collect()  # streams that were dropped in cycles
        await asyncio.sleep(3.0)
        if router.in_flight or router.waiting:
            judge.tell(f"at rest {router.in_flight} are in flight and {router.waiting} wait")
        # What was hung by a fault ends with its time limit, and the circuits close after that.
        pace = self.pace
        await asyncio.sleep(pace.tail + pace.hang_tail + STUCK_TAIL_S)
        for node in self.nodes:
            await self._serves_again(client, node)
        await asyncio.sleep(1.0)
        if router.in_flight or router.waiting:
            judge.tell(f"at the end {router.in_flight} are in flight and {router.waiting} wait")
        for node in self.nodes:
            if node.in_flight:
                judge.tell(f"at rest {node!r}")
        left = len(asyncio.all_tasks()) - tasks
        if left > 0:
            names = [str(task.get_coro()) for task in asyncio.all_tasks()]
            judge.tell(f"{left} tasks too many are left: {names}")
        self._look_at_slots()
        self._look_at_memory()

    async def _serves_again(self, client: AsyncClient, node: SimulatedNode) -> None:
        for model in sorted(self.judge.models[node.id] - {EMBEDDER}):
            try:
                answer = await client.generate(
                    model, "?", options={"num_predict": 3}, node_id=node.id, pin="require"
                )
            except Exception as error:
                self.judge.tell(f"{node.id} does not serve {model} again: {error}")
                continue
            if answer.response != "".join(script(node.id)[:3]):
                self.judge.tell(f"{node.id} serves {model} with another's answer")
        seen = next(one for one in self.router.nodes() if one.id == node.id)
        state = (seen.health, seen.circuit, seen.cordoned, seen.load_path_stuck)
        if state != ("up", "closed", False, False):
            self.judge.tell(f"{node.id} is not well again: {state}")

    def _look_at_slots(self) -> None:
        for node in self.nodes:
            most = node.settings.num_parallel + HEADROOM
            most += LEARNED_TOO_MANY * (node.id == LEARNS)
            for model, peak in node.peaks.items():
                if peak > most:
                    self.judge.tell(
                        f"{node.id} was handed {peak} requests for {model} at once; "
                        f"slots and headroom are {most}"
                    )

    def _look_at_memory(self) -> None:
        """
        In the second half nothing grows with the number of requests.

        One object kept of each request would be half as many objects as requests by then; a
        tenth is too many already. What is kept without being objects shows as memory of the
        process, which wavers by some pages of 10 MB that nodes send: 25 MB are too many.
        """
        middle = self.objects[5]
        grown = min(self.objects[-1], self.objects[-2]) - middle
        if grown > max(3000, self._number // 10):
            self.judge.tell(f"{grown} more objects than in the middle: {self.objects}")
        rss = min(self.rss_mb[-1], self.rss_mb[-2]) - self.rss_mb[5]
        if rss > 25.0:
            self.judge.tell(f"{rss:.1f} MB more than in the middle: {self.rss_mb}")


# ------------------------------------------------------------------------- two worlds


class _Session:
    """What both worlds share: the judge, the log, and the report."""

    def __init__(self, nodes: list[SimulatedNode], seed: int, clock: Callable[[], float]) -> None:
        models = {node_id: frozenset((*names, EMBEDDER)) for node_id, *_, names in SHAPES}
        self.judge = Judge(models, clock=clock, floor=RETRY_FLOOR)
        self.nodes = nodes
        self.seed = seed
        self.failures = 0
        self.log = LogWatch(self.judge)
        self.began = time.monotonic()

    def __enter__(self) -> _Session:
        logging.root.addHandler(self.log)
        logging.getLogger("hydra_llm").setLevel(logging.DEBUG)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.root.removeHandler(self.log)
        logging.getLogger("hydra_llm").setLevel(logging.NOTSET)

    def happened(self, event: Event) -> None:
        """Look at an event."""
        if type(event).__name__ == "AttemptFailed":
            self.failures += 1
        if SECRET.search(repr(event)):
            self.judge.tell(f"an event tells what was said: {event!r}")

    def report(self, soak: Soak, seconds: float) -> Report:
        """Sum up."""
        judge = self.judge
        done = judge.decisions
        attempts = done + self.failures
        judge.count_attempts(attempts)
        return Report(
            seed=self.seed,
            seconds=seconds,
            real_seconds=time.monotonic() - self.began,
            requests=judge.requests,
            attempts=attempts,
            decisions=judge.decisions,
            troubles=soak.troubles,
            loads=sum(node.load_count for node in self.nodes),
            log_lines=self.log.lines,
            outcomes=dict(judge.outcomes.most_common()),
            broken=judge.broken,
            rss_mb=soak.rss_mb,
            objects=soak.objects,
        )


def soak_in_virtual_time(
    hours: float, seed: int, *, pace: Pace = VIRTUAL, say: Callable[[str], object] = print
) -> Report:
    """Soak for so many virtual hours."""
    nodes = make_nodes(seed, pace)
    with VirtualCluster(nodes) as world, _Session(nodes, seed, world.clock) as session:
        soak = _soak(session, world.nodes(), pace=pace, say=say, clock=world.clock, world=world)
        world.run(soak.run(hours * 3600.0))
        world.run(soak.router.aclose())
        _look_at_connections(session)
    return session.report(soak, hours * 3600.0)


def soak_for_real(
    minutes: float, seed: int, *, pace: Pace = REAL, say: Callable[[str], object] = print
) -> Report:
    """Soak for so many minutes, over sockets."""
    nodes = make_nodes(seed, pace)
    threads = threading.active_count()
    with (
        SimulatedCluster(nodes) as cluster,
        _Session(nodes, seed, time.monotonic) as session,
    ):
        soak = _soak(session, cluster.nodes(local=False), pace=pace, say=say, clock=time.monotonic)

        async def work() -> None:
            await soak.run(minutes * 60.0)
            await soak.router.aclose()

        asyncio.run(work())
        _look_at_connections(session)
    left = threading.active_count() - threads
    if left > 0:
        names = [thread.name for thread in threading.enumerate()]
        session.judge.tell(f"{left} threads too many are left: {names}")
    return session.report(soak, minutes * 60.0)


def _soak(
    session: _Session,
    nodes: list[Any],
    *,
    pace: Pace,
    say: Callable[[str], object],
    clock: Callable[[], float],
    world: VirtualCluster | None = None,
) -> Soak:
    slots = {node_id: slots for node_id, _, slots, _ in SHAPES}
    told = [replace(node, slots=None if node.id == LEARNS else slots[node.id]) for node in nodes]
    settings = HydraSettings(
        told, keep_rates=False, random_seed=session.seed, vram_monitoring=False, **pace.settings
    )
    router = Router(
        settings=settings,
        on_event=session.happened,
        on_decision=session.judge.decided,
        world=world,
    )
    return Soak(
        session.nodes, router, session.judge, pace=pace, seed=session.seed, clock=clock, say=say
    )


def _look_at_connections(session: _Session) -> None:
    deadline = time.monotonic() + 2.0
    for node in session.nodes:
        while node.open_connections and time.monotonic() < deadline:
            time.sleep(0.01)
        if node.open_connections:
            session.judge.tell(f"{node.open_connections} connections to {node.id} are left open")
