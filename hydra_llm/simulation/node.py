"""A simulated Ollama node on a real port, and several of them as a cluster."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import h11

from hydra_llm.simulation import faults as faulty
from hydra_llm.simulation.api import OllamaApi
from hydra_llm.simulation.asked import read_asked
from hydra_llm.simulation.catalog import GB, ModelName, SimulatedModel, known_models
from hydra_llm.simulation.exchange import Exchange
from hydra_llm.simulation.faults import Fault
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Event, Eviction, Failure, LoadedRunner, LoadRecord
from hydra_llm.simulation.server import Connection, Listener, LoopThread
from hydra_llm.simulation.settings import Gpu, NodeSettings
from hydra_llm.simulation.text import rng_of
from hydra_llm.simulation.wire import (
    PLAIN_JSON,
    Reply,
    RequestError,
    error_body,
    go_json,
    json_reply,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from hydra_llm.types import Node

__all__ = ["RequestRecord", "SimulatedCluster", "SimulatedNode"]

_T = TypeVar("_T")
Outcome = Literal["open", "done", "error", "cut", "client left"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """
    One request a node got, as it stands when asked for.

    ``at`` and ``finished`` are seconds of ``time.monotonic``. ``outcome`` is the node's view:
    ``cut`` when it broke the answer off itself, ``client left`` when the other side did.
    """

    method: str
    path: str
    model: str | None
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    status: int | None
    at: float
    finished: float | None
    outcome: Outcome
    tokens: int


@dataclass(slots=True, eq=False)
class _Call:
    """A request being answered; only the loop's thread touches it."""

    connection: Connection
    record: RequestRecord
    faults: list[Fault] = field(default_factory=list)
    exchange: Exchange | None = None
    begun: bool = False

    def note(self, **changes: Any) -> None:
        """Write down how it goes."""
        self.record = replace(self.record, **changes)


class SimulatedNode:
    """
    An Ollama node without a GPU, on a real loopback port.

    ::

        with SimulatedNode("rig", vram_gb=24, speed=200) as node:
            node.preload("llama3.2:3b")
            httpx.post(f"{node.url}/api/chat", json={...})

    Args:
        id: its name.
        models: what is installed; a plain name stands for a model people know.
        vram_gb: of its GPU, in decimal GB; ``None`` is a node that computes on its CPU.
        used_vram_gb: what other programs hold of that.
        gpus: several GPUs, instead of ``vram_gb``.
        num_parallel, max_loaded_models, max_queue, keep_alive_s, default_num_ctx: as
            ``OLLAMA_NUM_PARALLEL`` and its like.
        gpu_bandwidth_gb_s: of the memory; with the model's size it gives the time of a token.
        prefill_ratio: how many times faster a prompt is read than an answer written.
        load_gb_s, load_fixed_s: how long a load takes.
        vram_recovery_s: how long freed VRAM takes to come back.
        go_template: ``False`` as ``OLLAMA_GO_TEMPLATE=0``.
        speed: simulated seconds in one real second.
        port: 0 takes a free one.
        token_output: tokens of a plain answer.
    """

    def __init__(
        self,
        id: str = "a",  # noqa: A002  # the name hydra_llm.Node has for it
        *,
        models: Iterable[str | SimulatedModel] = ("llama3.2:3b",),
        vram_gb: float | None = 24.0,
        used_vram_gb: float = 0.0,
        gpus: Iterable[Gpu] | None = None,
        ram_gb: float = 64.0,
        version: str = "0.32.15",
        num_parallel: int = 1,
        max_loaded_models: int | None = None,
        max_queue: int = 512,
        keep_alive_s: float = 300.0,
        default_num_ctx: int | None = None,
        gpu_bandwidth_gb_s: float = 400.0,
        cpu_bandwidth_gb_s: float = 40.0,
        prefill_ratio: float = 30.0,
        load_gb_s: float = 2.0,
        load_fixed_s: float = 0.5,
        vram_recovery_s: float = 0.5,
        go_template: bool = True,
        speed: float = 1.0,
        host: str = "127.0.0.1",
        port: int = 0,
        token_output: int = 64,
        seed: int = 0,
    ) -> None:
        self.id = id
        self.host = host
        self.speed = speed
        self.is_frozen = False
        one_gpu = (
            ()
            if vram_gb is None
            else (
                Gpu(total_bytes=round(vram_gb * GB), used_by_others_bytes=round(used_vram_gb * GB)),
            )
        )
        self.settings = NodeSettings(
            version=version,
            gpus=one_gpu if gpus is None else tuple(gpus),
            ram_bytes=round(ram_gb * GB),
            num_parallel=num_parallel,
            max_loaded_models=max_loaded_models,
            max_queue=max_queue,
            keep_alive_s=keep_alive_s,
            default_num_ctx=default_num_ctx,
            gpu_bandwidth=gpu_bandwidth_gb_s * GB,
            cpu_bandwidth=cpu_bandwidth_gb_s * GB,
            prefill_ratio=prefill_ratio,
            load_bandwidth=load_gb_s * GB,
            load_fixed_s=load_fixed_s,
            vram_recovery_s=vram_recovery_s,
            go_template=go_template,
            token_output=token_output,
            seed=seed,
        )
        self._wanted_port = port
        self._models = {model.parsed.key: model for model in map(_model, models)}
        self._api = self._new_api()
        self._faults: list[list[Any]] = []  # [fault, how often it may still strike]
        self._rng = rng_of("faults", seed, id)
        self._calls: dict[Connection, _Call] = {}
        self._tickets: dict[int, _Call] = {}
        self._connections: set[Connection] = set()
        self._records: list[_Call | RequestRecord] = []
        self._started_at = time.monotonic()
        self._frozen_at = 0.0
        self._at: float | None = None
        """The instant being dealt with, while there is one."""
        self._backlog: deque[Event] = deque()
        self._timer: Any = None  # asyncio.TimerHandle
        self._stale_ps: Reply | None = None
        self._thread: LoopThread | None = None
        self._own_thread = False
        self._listener: Listener | None = None
        self._is_up = False

    def __repr__(self) -> str:
        state = "frozen" if self.is_frozen else "up" if self._is_up else "down"
        return f"<SimulatedNode {self.id} [{state} | {self.in_flight} in flight]>"

    # ------------------------------------------------------------------ life

    def start(self, thread: LoopThread | None = None) -> Self:
        """Listen; ``thread`` shares one with other nodes."""
        if self._thread is not None:
            raise RuntimeError(f"node {self.id} has been started already")
        self._listener = Listener(self.host, self._wanted_port)
        self._own_thread = thread is None
        self._thread = thread or LoopThread(f"simulated-ollama-{self.id}")
        self._do(self._go_up)
        return self

    def stop(self) -> None:
        """Give back the port, the connections and the thread."""
        thread, listener = self._thread, self._listener
        if thread is None or listener is None:
            return
        self._do(self._go_down)
        self._do(listener.close)
        deadline = time.monotonic() + 5.0
        while self._do(lambda: len(self._connections)) and time.monotonic() < deadline:
            time.sleep(0.001)
        self._thread = self._listener = None
        if self._own_thread:
            thread.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def kill(self) -> None:
        """End as by SIGKILL: every connection breaks, the port refuses, runners are gone."""

        def die() -> None:
            if self._is_up and self._listener is not None:
                self._go_down()
                self._listener.refuse()

        self._do(die)

    def revive(self) -> None:
        """Start again on the same port, with nothing loaded."""

        def rise() -> None:
            if not self._is_up:
                self._api = self._new_api()
                self._go_up()

        self._do(rise)

    def freeze(self) -> None:
        """Accept connections and never send a byte, until thawed: a stopped process."""

        def stop() -> None:
            if self.is_frozen:
                return
            with self._moment():
                self.is_frozen, self._frozen_at = True, time.monotonic()
            self._cancel_timer()

        self._do(stop)

    def thaw(self) -> None:
        """Go on where it was frozen."""

        def go_on() -> None:
            if not self.is_frozen:
                return
            self.is_frozen = False
            self._started_at += time.monotonic() - self._frozen_at
            for connection in list(self._connections):
                connection.thaw()
            self._tick()

        self._do(go_on)

    # ------------------------------------------------------------------ models

    def preload(
        self, model: str, *, num_ctx: int | None = None, keep_alive: float | None = None
    ) -> None:
        """Have a model loaded already, without the time of a load."""
        found = self._installed(model)

        def load() -> None:
            with self._moment() as now:
                self._api.server.preload(found, now, num_ctx=num_ctx, keep_alive=keep_alive)

        self._do(load)

    def add_model(self, model: str | SimulatedModel) -> None:
        """Install a model."""
        added = _model(model)
        self._models[added.parsed.key] = added
        self._do(lambda: self._api.models.__setitem__(added.parsed.key, added))

    def remove_model(self, name: str) -> None:
        """Delete a model; a loaded one stays loaded until it is idle."""
        model = self._installed(name)

        def remove() -> None:
            self._models.pop(model.parsed.key, None)
            self._api.models.pop(model.parsed.key, None)
            with self._moment() as now:
                self._api.server.unload(model, now)

        self._do(remove)

    def kill_runner(self, name: str) -> None:
        """End the process of one model, as the kernel does when memory is short."""
        model = self._installed(name)

        def end() -> None:
            with self._moment() as now:
                self._api.server.kill_runner(model, now)

        self._do(end)

    # ------------------------------------------------------------------ faults

    def inject(self, fault: Fault, **limits: Any) -> None:
        """
        Have something go wrong from now on.

        Args:
            fault: what.
            limits: ``times``, ``paths``, ``models``, ``probability``, as on the fault.
        """
        if limits:
            fault = replace(fault, **limits)

        def put() -> None:
            self._faults.append([fault, fault.times])
            if isinstance(fault, faulty.SlowFault):
                self._slow_down(fault)
            if isinstance(fault, faulty.PsFault) and fault.shows == "stale":
                reply = self._api.handle("GET", "/api/ps", b"", self._now())
                self._stale_ps = reply if isinstance(reply, Reply) else None

        self._do(put)

    def clear_faults(self) -> None:
        """Be well again; requests already struck stay struck."""

        def clear() -> None:
            self._faults.clear()
            with self._moment() as now:
                self._api.server.slow_down(1.0, now)

        self._do(clear)

    def _slow_down(self, fault: faulty.SlowFault) -> None:
        with self._moment() as now:
            self._api.server.slow_down(fault.factor, now)
        if fault.for_s is not None and self._thread is not None:
            api = self._api

            def end() -> None:
                with self._moment() as now:
                    api.server.slow_down(1.0, now)

            self._thread.loop.call_later(fault.for_s / self.speed, end)

    # ------------------------------------------------------------------ what is so

    @property
    def port(self) -> int:
        """Where it listens."""
        if self._listener is None:
            raise RuntimeError(f"node {self.id} has not been started")
        return self._listener.port

    @property
    def url(self) -> str:
        """Where it listens, as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def requests(self) -> list[RequestRecord]:
        """What it was asked, oldest first."""
        return self._do(
            lambda: [one.record if isinstance(one, _Call) else one for one in self._records]
        )

    @property
    def in_flight(self) -> int:
        """Requests it has not answered yet."""
        return self._do(lambda: len(self._calls))

    @property
    def open_connections(self) -> int:
        """Connections clients hold, idle ones included."""
        return self._do(lambda: len(self._connections))

    @property
    def loaded(self) -> dict[str, LoadedRunner]:
        """What is loaded, by the name ``/api/ps`` gives."""
        running = self._do(lambda: self._api.server.running(self._now()))
        return {runner.model.parsed.short: runner for runner in running}

    @property
    def loads(self) -> list[LoadRecord]:
        """Every load since it started, on the node's simulated clock."""
        return self._do(lambda: list(self._api.server.loads))

    @property
    def load_count(self) -> int:
        """How many loads there were."""
        return len(self.loads)

    @property
    def evictions(self) -> list[Eviction]:
        """Every runner that was unloaded, and why."""
        return self._do(lambda: list(self._api.server.evictions))

    @property
    def vram_used_bytes(self) -> int:
        """What Ollama holds of the GPUs."""
        return self._do(lambda: self._api.server.vram_used_bytes)

    @property
    def peak_vram_bytes(self) -> int:
        """The most it ever held."""
        return self._do(lambda: self._api.server.peak_vram_bytes)

    def node(self, **overrides: Any) -> Node:
        """Give the `hydra_llm.Node` a user would configure for it."""
        from hydra_llm.types import Node  # the room below may be missing

        total = sum(gpu.total_bytes for gpu in self.settings.gpus)
        fields: dict[str, Any] = {
            "url": self.url,
            "id": self.id,
            "vram_gb": total / GB if total else None,
            "ram_gb": self.settings.ram_bytes / GB,
        }
        return Node(**(fields | overrides))

    # ------------------------------------------------------------------ as a Handler

    def opened(self, connection: Connection) -> None:
        """Take notice of a new connection."""
        self._connections.add(connection)

    def left(self, connection: Connection) -> None:
        """Free what a client held that has left."""
        self._connections.discard(connection)
        call = self._calls.pop(connection, None)
        if call is None:
            return
        self._over(call, "client left")
        if call.exchange is not None:
            self._tickets.pop(call.exchange.ticket.id, None)
            with self._moment() as now:
                self._api.server.cancel(call.exchange.ticket, now)

    def request(self, connection: Connection, request: h11.Request, body: bytes) -> None:
        """Answer a request, or strike it with a fault."""
        method, path = request.method.decode(), request.target.decode()
        headers = {name.decode().lower(): value.decode("latin-1")
                   for name, value in request.headers}  # fmt: skip
        document = _document(body)
        model = document.get("model")
        record = RequestRecord(
            method=method,
            path=path,
            model=model if isinstance(model, str) else None,
            body=document,
            headers=headers,
            status=None,
            at=time.monotonic(),
            finished=None,
            outcome="open",
            tokens=0,
        )
        call = _Call(connection, record)
        self._calls[connection] = call
        self._records.append(call)
        call.faults = self._strike(call)
        for fault in call.faults:
            if faulty.stands_in(fault):
                self._stand_in(call, fault)
                return
        watch = any(faulty.token_at(fault) is not None for fault in call.faults)
        host = headers.get("host", "")
        with self._moment() as now:
            answer = self._api.handle(method, path, body, now, host=host, watch=watch)
            if isinstance(answer, Reply):
                self._reply(call, self._ps_reply(call, answer))
            else:
                call.exchange = answer
                self._tickets[answer.ticket.id] = call
                self._at_tokens(call, 0)

    # ------------------------------------------------------------------ inside

    def _new_api(self) -> OllamaApi:
        return OllamaApi(OllamaServer(self.settings), self._models, wall_at=self._wall_at)

    def _go_up(self) -> None:
        assert self._thread is not None
        assert self._listener is not None
        self._is_up = True
        self._listener.listen(self._thread.loop, lambda: Connection(self))

    def _go_down(self) -> None:
        self._is_up = self.is_frozen = False
        self._cancel_timer()
        for call in list(self._calls.values()):
            self._over(call, "cut")
        self._calls.clear()
        self._tickets.clear()
        self._backlog.clear()
        for connection in list(self._connections):
            connection.drop()

    def _do(self, function: Callable[[], _T]) -> _T:
        """Run on the thread that owns the node's state; without one, here."""
        return function() if self._thread is None else self._thread.call(function)

    def _now(self) -> float:
        """Simulated seconds since the start; they stand still while it is frozen."""
        if self._at is not None:
            return self._at
        real = self._frozen_at if self.is_frozen else time.monotonic()
        return (real - self._started_at) * self.speed

    def _wall_at(self, simulated: float) -> float:
        """When, on the clients' clock, something happens: a date has to be true for them."""
        return time.time() + (simulated - self._now()) / self.speed

    def _installed(self, name: str) -> SimulatedModel:
        parsed = ModelName.parse(name)
        model = self._models.get(parsed.key) if parsed else None
        if model is None:
            raise KeyError(f"node {self.id} has no model {name!r}")
        return model

    @contextmanager
    def _moment(self) -> Iterator[float]:
        """
        Hold the node's clock while something is done to it.

        What was due before is dealt with first, and what comes of it after.
        """
        if self._at is not None:  # set off by an event: it happens at the event's time
            yield self._at
            return
        now = self._now()
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
            server = self._api.server
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

    def _tick(self) -> None:
        with self._moment():
            pass

    @property
    def _is_awake(self) -> bool:
        return self._is_up and not self.is_frozen

    def _set_timer(self) -> None:
        self._cancel_timer()
        at = self._api.server.next_event_at()
        if at is not None and self._is_awake and self._thread is not None:
            delay = max(0.0, (at - self._now()) / self.speed)
            self._timer = self._thread.loop.call_later(delay, self._tick)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _dispatch(self, event: Event) -> None:
        call = self._tickets.get(event.ticket.id) if event.ticket is not None else None
        if call is None or call.exchange is None:
            return
        if event.kind == "token":
            chunk = call.exchange.token(event.index)
            if call.exchange.stream and chunk:
                self._chunk(call, chunk)
            call.note(tokens=event.index + 1)
            self._at_tokens(call, event.index + 1)
        elif event.kind == "done":
            self._end(call, call.exchange.finish(), "done")
        elif event.kind == "failed":
            failure = event.ticket.failure if event.ticket else None
            assert failure is not None
            self._end(call, call.exchange.fail(failure, begun=call.begun), "error")

    def _chunk(self, call: _Call, chunk: bytes) -> None:
        self._begin(call)
        call.connection.chunk(chunk)

    def _begin(self, call: _Call) -> None:
        """Send the head: only now, with the first token."""
        if not call.begun and call.exchange is not None:
            call.begun = True
            call.note(status=200)
            call.connection.start(200, call.exchange.content_type)

    def _end(self, call: _Call, ending: Reply | tuple[bytes, ...], outcome: Outcome) -> None:
        if isinstance(ending, Reply):
            self._reply(call, ending, outcome)
            return
        for chunk in ending:
            self._chunk(call, chunk)
        self._begin(call)
        self._forget(call, outcome)
        call.connection.finish()

    def _reply(self, call: _Call, reply: Reply | None, outcome: Outcome | None = None) -> None:
        if reply is None:
            return
        call.note(status=reply.status)
        self._forget(call, outcome or ("done" if reply.status < 400 else "error"))
        call.connection.send(reply, is_head=call.record.method == "HEAD")

    def _forget(self, call: _Call, outcome: Outcome) -> None:
        self._over(call, outcome)
        self._calls.pop(call.connection, None)
        if call.exchange is not None:
            self._tickets.pop(call.exchange.ticket.id, None)
            self._api.server.cancel(call.exchange.ticket, self._now())

    def _over(self, call: _Call, outcome: Outcome) -> None:
        call.note(finished=time.monotonic(), outcome=outcome)
        self._records[self._records.index(call)] = call.record

    # ------------------------------------------------------------------ striking

    def _strike(self, call: _Call) -> list[Fault]:
        """Choose the faults that hit a request, and count them."""
        struck: list[Fault] = []
        for entry in list(self._faults):
            fault, left = entry
            if left == 0 or not self._hits(fault, call):
                continue
            if fault.probability < 1.0 and self._rng.random() >= fault.probability:
                continue
            if left is not None:
                entry[1] = left - 1
            struck.append(fault)
        return struck

    def _hits(self, fault: Fault, call: _Call) -> bool:
        record = call.record
        if isinstance(fault, faulty.PsFault):
            return record.path == "/api/ps"
        if fault.models is not None and record.model not in fault.models:
            return False
        if fault.paths is None:
            if record.method != "POST" or record.path == "/api/show":
                return False
        elif record.path not in fault.paths and "*" not in fault.paths:
            return False
        if isinstance(fault, faulty.HangFault) and fault.loads_only:
            return self._would_load(record)
        return True

    def _would_load(self, record: RequestRecord) -> bool:
        parsed = ModelName.parse(record.model or "")
        model = self._models.get(parsed.key) if parsed else None
        if model is None:
            return False
        try:
            options = read_asked(record.body, "Request").runner_options
        except RequestError:
            return False
        return self._api.server.would_load(model, options)

    def _stand_in(self, call: _Call, fault: Fault) -> None:
        """Give the answer a fault has in place of the real one."""
        is_v1 = call.record.path.startswith("/v1/")
        if isinstance(fault, faulty.HangFault):
            return
        if isinstance(fault, faulty.ResetFault):
            self._forget(call, "cut")
            call.connection.reset()
            return
        if isinstance(fault, faulty.StatusFault):
            wait = fault.retry_after
            headers = () if wait is None else (("Retry-After", f"{wait:g}"),)
            body = error_body(fault.status, fault.message, is_v1=is_v1)
            reply = replace(json_reply(body, fault.status), headers=headers)
        elif isinstance(fault, faulty.MissingModelFault):
            text = f"model '{call.record.model}' not found"
            reply = json_reply(error_body(404, text, is_v1=is_v1), 404)
        elif isinstance(fault, faulty.HtmlFault):
            page = b"<!DOCTYPE html>\n<html><body><h1>Welcome</h1></body></html>\n"
            reply = Reply(fault.status, page, "text/html; charset=utf-8")
        elif isinstance(fault, faulty.HugeFault):
            body = {"model": call.record.model, "filler": "x" * fault.size_bytes}
            reply = json_reply(body, content_type=PLAIN_JSON)
        else:
            assert isinstance(fault, faulty.ErrorBodyFault)
            reply = json_reply(error_body(500, fault.text, is_v1=is_v1))
        self._reply(call, reply, "error")

    def _at_tokens(self, call: _Call, tokens: int) -> None:
        """Strike a stream that has come to so many tokens."""
        for fault in call.faults:
            if faulty.token_at(fault) != tokens or call.connection not in self._calls:
                continue
            if isinstance(fault, faulty.TokenFault):
                fault.action(self)
            else:
                self._break_off(call, fault)

    def _break_off(self, call: _Call, fault: Fault) -> None:
        exchange = call.exchange
        assert exchange is not None
        if isinstance(fault, faulty.StallFault):
            # The runner goes on for nobody; the client may wait.
            self._tickets.pop(exchange.ticket.id, None)
            return
        if isinstance(fault, faulty.ErrorLineFault):
            if exchange.stream:
                self._begin(call)
            failure = Failure(500, fault.text, "runner killed")
            self._end(call, exchange.fail(failure, begun=call.begun), "error")
            return
        if exchange.stream:
            self._begin(call)
        self._forget(call, "cut")
        if isinstance(fault, faulty.CutFault) and exchange.stream:
            call.connection.finish()
        else:
            call.connection.reset()

    def _ps_reply(self, call: _Call, truth: Reply) -> Reply | None:
        """Give what ``/api/ps`` says under its faults; ``None`` when it says it later."""
        reply = truth
        for fault in call.faults:
            if not isinstance(fault, faulty.PsFault):
                continue
            if fault.shows == "stale" and self._stale_ps is not None:
                reply = self._stale_ps
            elif fault.shows in {"empty", "given"}:
                reply = Reply(200, go_json({"models": list(fault.entries)}).encode())
            if fault.block_s and self._thread is not None:
                late = reply

                def send() -> None:
                    if call.connection in self._calls:
                        self._reply(call, late)

                self._thread.loop.call_later(fault.block_s, send)
                return None
        return reply


class SimulatedCluster:
    """
    Several simulated nodes on one thread.

    ::

        with SimulatedCluster.demo(speed=100) as cluster:
            router = Router(cluster.nodes())
    """

    def __init__(self, nodes: Iterable[SimulatedNode]) -> None:
        self.node_list = list(nodes)
        ids = [node.id for node in self.node_list]
        if len(set(ids)) != len(ids):
            raise ValueError(f"two nodes have one id: {', '.join(sorted(ids))}")
        self._thread: LoopThread | None = None

    @classmethod
    def demo(cls, *, speed: float = 1.0) -> SimulatedCluster:
        """Make three home machines: a workstation in use, a rack, and a gaming PC."""
        return cls(
            [
                SimulatedNode(
                    "workstation",
                    models=("llama3.2:3b", "qwen3:8b", "nomic-embed-text"),
                    vram_gb=8.0, used_vram_gb=6.5, ram_gb=32.0,
                    gpu_bandwidth_gb_s=270.0, cpu_bandwidth_gb_s=50.0, speed=speed,
                ),
                SimulatedNode(
                    "rack",
                    models=("llama3.2:3b", "qwen3:8b", "gemma3:12b", "mistral-small:24b",
                            "nomic-embed-text"),
                    vram_gb=24.0, used_vram_gb=4.0, ram_gb=128.0,
                    gpu_bandwidth_gb_s=930.0, cpu_bandwidth_gb_s=80.0, load_gb_s=3.0, speed=speed,
                ),
                SimulatedNode(
                    "gaming",
                    models=("llama3.2:3b", "qwen3:8b", "gemma3:12b"),
                    vram_gb=12.0, used_vram_gb=2.0, ram_gb=32.0,
                    gpu_bandwidth_gb_s=500.0, cpu_bandwidth_gb_s=60.0, speed=speed,
                ),
            ]
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<SimulatedCluster [{', '.join(node.id for node in self.node_list)}]>"

    def __getitem__(self, id: str) -> SimulatedNode:  # noqa: A002
        for node in self.node_list:
            if node.id == id:
                return node
        raise KeyError(id)

    def __iter__(self) -> Iterator[SimulatedNode]:
        return iter(self.node_list)

    def __len__(self) -> int:
        return len(self.node_list)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def urls(self) -> list[str]:
        """Where the nodes listen."""
        return [node.url for node in self.node_list]

    def nodes(self, **overrides: Any) -> list[Node]:
        """Give the `hydra_llm.Node` of each."""
        return [node.node(**overrides) for node in self.node_list]

    def start(self) -> Self:
        """Start all nodes."""
        self._thread = LoopThread()
        try:
            for node in self.node_list:
                node.start(self._thread)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop all nodes."""
        for node in self.node_list:
            node.stop()
        if self._thread is not None:
            self._thread.close()
            self._thread = None


def _model(model: str | SimulatedModel) -> SimulatedModel:
    if isinstance(model, SimulatedModel):
        return model
    known = known_models()
    return known.get(model) or SimulatedModel(model)


def _document(body: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
