"""
A node at work: its clock, its requests, and the faults that strike them.

All of it lives on the thread of the event loop, and nothing here is called from another.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import h11

from hydra_llm.simulation.api import OllamaApi
from hydra_llm.simulation.asked import read_asked
from hydra_llm.simulation.calls import Call, Outcome, RequestRecord
from hydra_llm.simulation.catalog import ModelName, SimulatedModel
from hydra_llm.simulation.faults import (
    CutFault,
    EndlessFault,
    ErrorLineFault,
    Fault,
    PsFault,
    ResetFault,
    SlowFault,
    SlowLorisFault,
    StallFault,
    TokenFault,
)
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Event, Eviction, Failure, Job, LoadRecord, Ticket
from hydra_llm.simulation.server import Connection
from hydra_llm.simulation.settings import NodeSettings
from hydra_llm.simulation.stage import Stage
from hydra_llm.simulation.striking import (
    Faults,
    arranged,
    endless,
    ps_reply,
    reply_of,
    stands_in,
    token_at,
)
from hydra_llm.simulation.text import rng_of
from hydra_llm.simulation.wire import PLAIN_JSON, Reply, RequestError

if TYPE_CHECKING:
    from hydra_llm.simulation.node import SimulatedNode

__all__ = ["NodeServing"]

_LEAST_DELAY_S = 1e-9
"""Rounding may leave an event a hair ahead of a clock that does not go on by itself."""


class NodeServing:
    """
    What a `SimulatedNode` does, on the loop's thread.

    ::

        down ──rise──▶ up ⇄ frozen
          ▲             │      │
          └────fall─────┴──────┘

    Falling breaks every connection and forgets what was loaded; a frozen node's clock stands
    still and its connections are silent.
    """

    def __init__(
        self,
        owner: SimulatedNode,
        settings: NodeSettings,
        models: Mapping[str, SimulatedModel],
        *,
        speed: float,
        keep_requests: int | None = None,
    ) -> None:
        self.settings = settings
        self.models = dict(models)
        self.is_up = False
        self.is_frozen = False
        self.tls: ssl.SSLContext | None = None
        self.faults = Faults(rng_of("faults", settings.seed, owner.id), self._would_load)
        # No set: in which order they break has to be the same when a run is repeated.
        self.connections: dict[Connection, None] = {}
        self.peaks: dict[str, int] = {}
        self._owner = owner
        self._speed = speed
        self._calls: dict[Connection, Call] = {}
        self._tickets: dict[int, Call] = {}
        self._asking: Counter[str] = Counter()
        """Requests for each model that are being answered."""
        self._records: dict[int, Call | RequestRecord] = {}
        self._number = 0
        self._keep_requests = keep_requests
        self._clock = time.monotonic
        self._wall_clock = time.time
        self._began: float | None = None
        """When it first rose; its own time begins then."""
        self._ahead = 0.0
        """What clients' dates have over the clock."""
        self._frozen_at = 0.0
        self._at: float | None = None
        """The instant being dealt with, while there is one."""
        self._backlog: deque[Event] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._stale_ps: Reply | None = None
        self._guests: list[Ticket] = []
        """Requests of programs that never came over a socket."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._past_loads: list[LoadRecord] = []
        self._past_evictions: list[Eviction] = []
        self._past_peak = 0
        self.api = self._new_api()

    # ------------------------------------------------------------------ up, down, frozen

    def rise(self, stage: Stage) -> None:
        """Begin to work, with nothing loaded but what was preloaded while down."""
        if self._loop is not stage.loop:
            now = self.now
            self._clock, self._wall_clock = stage.clock, stage.wall_clock
            self._began = self._clock() - now / self._speed
            self._ahead = self._wall_clock() - self._clock()
        self._loop, self.is_up = stage.loop, True
        self.tick()

    def fall(self) -> None:
        """Break every connection; what was loaded is gone."""
        self.is_up = self.is_frozen = False
        self._cancel_timer()
        for call in self._calls.values():
            self._over(call, "cut")
        self._calls.clear()
        self._tickets.clear()
        self._backlog.clear()
        self._guests.clear()
        for connection in list(self.connections):
            connection.drop()
        server = self.api.server
        self._past_loads += server.loads
        self._past_evictions += server.evictions
        self._past_peak = self.peak_vram_bytes
        self.api = self._new_api()

    def hang_up(self) -> None:
        """Break every connection; the requests on them are over."""
        with self.moment():
            for call in list(self._calls.values()):
                self._forget(call, "cut")
        for connection in self.connections:
            connection.drop()

    def freeze(self) -> None:
        """Stand still."""
        if not self.is_frozen:
            with self.moment():
                self.is_frozen, self._frozen_at = True, self._clock()
            self._cancel_timer()

    def thaw(self) -> None:
        """Go on."""
        if not self.is_frozen:
            return
        self.is_frozen = False
        if self._began is not None:
            self._began += self._clock() - self._frozen_at
        for connection in list(self.connections):
            connection.thaw()
        self.tick()

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> float:
        """Simulated seconds since the start."""
        if self._at is not None:
            return self._at
        if self._began is None:
            return 0.0
        real = self._frozen_at if self.is_frozen else self._clock()
        return (real - self._began) * self._speed

    @contextmanager
    def moment(self) -> Iterator[float]:
        """
        Hold the node's clock while something is done to it.

        What was due before is dealt with first, and what comes of it after.
        """
        if self._at is not None:  # set off by an event: it happens at the event's time
            yield self._at
            return
        now = self.now
        self._run_to(now)
        self._at = now
        try:
            yield now
        finally:
            self._at = None
        self._run_to(now)
        self._set_timer()

    def _run_to(self, now: float) -> None:
        """Deal with all that is due by ``now``, one instant after the other."""
        while self._is_awake:
            server = self.api.server
            due = server.next_event_at()
            at = now if due is None else min(due, now)
            self._backlog += server.advance(at)
            self._at = at
            try:
                while self._backlog and self._is_awake:
                    self._dispatch(self._backlog.popleft())
            finally:
                self._at = None
            if due is None or due > now:
                return

    def tick(self) -> None:
        """Deal with what is due, and wait for what is next."""
        with self.moment():
            pass

    @property
    def _is_awake(self) -> bool:
        return self.is_up and not self.is_frozen

    def _set_timer(self) -> None:
        self._cancel_timer()
        at = self.api.server.next_event_at()
        if at is not None and self._is_awake and self._loop is not None:
            delay = max(_LEAST_DELAY_S, (at - self.now) / self._speed)
            self._timer = self._loop.call_later(delay, self.tick)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wall_now(self) -> float:
        return self._wall_clock()

    def _wall_at(self, simulated: float) -> float:
        """When, on the clients' clock, something happens: a date has to be true for them."""
        # Not from what time it is now: asked twice, a date has to be the same to the last digit.
        return self._ahead + (self._began or 0.0) + simulated / self._speed

    def _later(self, seconds: float, what: Any) -> None:
        if self._loop is not None:
            self._loop.call_later(seconds, what)

    def _new_api(self) -> OllamaApi:
        server = OllamaServer(self.settings)
        return OllamaApi(
            server,
            self.models,
            wall_at=self._wall_at,
            wall_clock=self._wall_now,
            speed=self._speed,
        )

    # ------------------------------------------------------------------ what is so

    @property
    def in_flight(self) -> int:
        """Requests not answered yet."""
        return len(self._calls)

    @property
    def loads(self) -> list[LoadRecord]:
        """Every load so far, those before a kill included."""
        return self._past_loads + self.api.server.loads

    @property
    def evictions(self) -> list[Eviction]:
        """Every eviction so far, those before a kill included."""
        return self._past_evictions + self.api.server.evictions

    @property
    def peak_vram_bytes(self) -> int:
        """The most VRAM that was ever held."""
        return max(self._past_peak, self.api.server.peak_vram_bytes)

    def records(self) -> list[RequestRecord]:
        """Every request so far, oldest first."""
        return [one.record if isinstance(one, Call) else one for one in self._records.values()]

    def find(self, name: str) -> SimulatedModel | None:
        """Give the installed model of that name."""
        parsed = ModelName.parse(name)
        return self.api.models.get(parsed.key) if parsed else None

    # ------------------------------------------------------------------ as a Handler

    def opened(self, connection: Connection) -> None:
        """Take notice of a new connection; one that was accepted just before a death is cut."""
        self.connections[connection] = None
        if not self.is_up:
            connection.drop()

    def left(self, connection: Connection) -> None:
        """Free what a client held that has left."""
        self.connections.pop(connection, None)
        call = self._calls.get(connection)
        if call is not None:
            with self.moment():
                self._forget(call, "client left")

    def request(self, connection: Connection, request: h11.Request, body: bytes) -> None:
        """Answer a request, or strike it with a fault."""
        headers = {
            name.decode().lower(): value.decode("latin-1") for name, value in request.headers
        }
        document = _document(body)
        model = document.get("model")
        record = RequestRecord(
            method=request.method.decode(),
            path=request.target.decode().split("?", 1)[0],
            model=model if isinstance(model, str) else None,
            body=document,
            headers=headers,
            at=self._clock(),
        )
        call = Call(connection, record, self._number, self.faults.strike(record))
        self._take_down(call)
        for fault in call.faults:
            if isinstance(fault, SlowLorisFault) and not fault.after:
                connection.drip(fault.pause_s, spare_head=fault.after == 0)
        for fault in call.faults:
            if stands_in(fault):
                self._stand_in(call, fault)
                return
        with self.moment() as now:
            answer = self.api.handle(
                record.method,
                record.path,
                body,
                now,
                # Bound to another address than loopback, a server does not look at the header.
                host=headers.get("host", "") if _is_loopback(self._owner.host) else "",
                arranged=arranged(call.faults),
            )
            if isinstance(answer, Reply):
                self._reply_late_or_now(call, answer)
            else:
                call.exchange = answer
                self._tickets[answer.ticket.id] = call
                self._at_tokens(call, 0)

    def _take_down(self, call: Call) -> None:
        """Keep the books of a request that has come."""
        self._number += 1
        self._calls[call.connection] = self._records[call.number] = call
        if self._keep_requests is not None and len(self._records) > self._keep_requests:
            del self._records[next(iter(self._records))]
        if (model := _model_at_work(call.record)) is not None:
            self._asking[model] += 1
            self.peaks[model] = max(self.peaks.get(model, 0), self._asking[model])

    # ------------------------------------------------------------------ answering

    def _dispatch(self, event: Event) -> None:
        call = self._tickets.get(event.ticket.id) if event.ticket is not None else None
        if call is None or call.exchange is None:
            return
        if event.kind == "token":
            after = event.index + event.tokens
            chunk = call.exchange.part(event.index, after)
            if call.exchange.stream and chunk:
                self._chunk(call, chunk)
            call.note(tokens=after)
            for tokens in range(event.index + 1, after + 1):
                self._at_tokens(call, tokens)
        elif event.kind == "done":
            self._end(call, call.exchange.finish(), "done")
        elif event.kind == "failed":
            failure = event.ticket.failure if event.ticket else None
            assert failure is not None
            self._end(call, call.exchange.fail(failure, begun=call.begun), "error")

    def _chunk(self, call: Call, chunk: bytes) -> None:
        self._begin(call)
        call.connection.chunk(chunk)

    def _begin(self, call: Call) -> None:
        """Send the head: only now, with the first token."""
        if not call.begun and call.exchange is not None:
            call.begun = True
            call.note(status=200)
            exchange = call.exchange
            kind = exchange.content_type if exchange.stream else PLAIN_JSON
            call.connection.start(200, kind)

    def _end(self, call: Call, ending: Reply | tuple[bytes, ...], outcome: Outcome) -> None:
        if isinstance(ending, Reply):
            self._reply(call, ending, outcome)
            return
        self._begin(call)
        # First: whoever has read the end finds that the node has ended it.
        self._forget(call, outcome)
        for chunk in ending:
            call.connection.chunk(chunk)
        call.connection.finish()

    def _reply(self, call: Call, reply: Reply, outcome: Outcome | None = None) -> None:
        call.note(status=reply.status)
        self._forget(call, outcome or ("done" if reply.status < 400 else "error"))
        call.connection.send(reply, is_head=call.record.method == "HEAD")

    def _forget(self, call: Call, outcome: Outcome) -> None:
        self._over(call, outcome)
        self._calls.pop(call.connection, None)
        if call.exchange is not None:
            self._tickets.pop(call.exchange.ticket.id, None)
            self.api.server.cancel(call.exchange.ticket, self.now)

    def _over(self, call: Call, outcome: Outcome) -> None:
        call.note(finished=self._clock(), outcome=outcome)
        # Only the record is kept: a call holds the whole answer.
        if call.number in self._records:
            self._records[call.number] = call.record
        if (model := _model_at_work(call.record)) is not None:
            self._asking[model] -= 1

    # ------------------------------------------------------------------ striking

    def slow_down(self, fault: SlowFault) -> None:
        """Make everything take longer, for a time."""
        api = self.api
        with self.moment() as now:
            api.server.slow_down(fault.factor, now)
        if fault.for_s is None:
            return

        def end() -> None:
            with self.moment() as now:
                api.server.slow_down(1.0, now)

        self._later(fault.for_s / self._speed, end)

    def occupy(self, job: Job) -> None:
        """Have a request served that comes from nowhere and is for nobody."""
        with self.moment() as now:
            self._guests.append(self.api.server.submit(job, now))

    def vacate(self) -> None:
        """End what came from nowhere."""
        with self.moment() as now:
            for ticket in self._guests:
                self.api.server.cancel(ticket, now)
            self._guests.clear()

    def keep_ps(self) -> None:
        """Remember what ``/api/ps`` says now, to go on saying it."""
        with self.moment() as now:
            reply = self.api.handle("GET", "/api/ps", b"", now)
        self._stale_ps = reply if isinstance(reply, Reply) else None

    def _would_load(self, record: RequestRecord) -> bool:
        model = self.find(record.model or "")
        if model is None:
            return False
        try:
            options = read_asked(record.body, "Request").runner_options
        except RequestError:
            return False
        return self.api.server.would_load(model, options)

    def _stand_in(self, call: Call, fault: Fault) -> None:
        """Answer with a fault in place of the truth."""
        if isinstance(fault, ResetFault):
            self._forget(call, "cut")
            call.connection.reset()
        elif (reply := reply_of(fault, call.record)) is not None:
            self._reply(call, reply, "error")

    def _at_tokens(self, call: Call, tokens: int) -> None:
        """Strike a stream that has come to so many tokens."""
        for fault in call.faults:
            if token_at(fault) != tokens or call.connection not in self._calls:
                continue
            if isinstance(fault, TokenFault):
                fault.action(self._owner)
            elif isinstance(fault, SlowLorisFault):
                call.connection.drip(fault.pause_s, spare_head=True)
            elif isinstance(fault, EndlessFault):
                self._go_on_for_ever(call, fault)
            else:
                self._break_off(call, fault)

    def _break_off(self, call: Call, fault: Fault) -> None:
        exchange = call.exchange
        assert exchange is not None
        if isinstance(fault, StallFault):
            # The runner goes on for nobody; the client may wait.
            self._tickets.pop(exchange.ticket.id, None)
            return
        if isinstance(fault, ErrorLineFault):
            if exchange.stream:
                self._begin(call)
            failure = Failure(500, fault.text, "runner killed")
            self._end(call, exchange.fail(failure, begun=call.begun), "error")
            return
        if exchange.stream:
            self._begin(call)
        self._forget(call, "cut")
        if isinstance(fault, CutFault) and exchange.stream:
            call.connection.finish()
        else:
            call.connection.reset()

    def _go_on_for_ever(self, call: Call, fault: EndlessFault) -> None:
        exchange = call.exchange
        assert exchange is not None
        # The runner goes on for nobody; the client gets what is made up here.
        self._tickets.pop(exchange.ticket.id, None)
        pieces = endless(exchange, in_one_line=fault.in_one_line)
        self._begin(call)

        def next_piece() -> None:
            if call.connection not in self._calls:
                return
            if not self.is_frozen and not call.connection.is_clogged:
                call.connection.chunk(next(pieces))
            self._later(fault.pause_s, next_piece)

        next_piece()

    def _reply_late_or_now(self, call: Call, reply: Reply) -> None:
        wait = 0.0
        for fault in call.faults:
            if isinstance(fault, PsFault):
                reply = ps_reply(fault, reply, stale=self._stale_ps)
                wait = max(wait, fault.block_s)
        if not wait:
            self._reply(call, reply)
            return

        def send() -> None:
            if call.connection in self._calls:
                self._reply(call, reply)

        self._later(wait, send)


def _model_at_work(record: RequestRecord) -> str | None:
    """The model that a request keeps busy."""
    return None if record.path == "/api/show" else record.model


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")


def _document(body: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
