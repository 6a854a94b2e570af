"""
A model of one Ollama server: the scheduler and its runners, without I/O, threads or a clock.

::

    server = OllamaServer(NodeSettings(gpus=(Gpu(total_bytes=24 * GB),)))
    ticket = server.submit(Job(model=model, prompt=((key, 900),), answer_tokens=200), now=0.0)
    while (at := server.next_event_at()) is not None:
        for event in server.advance(at): ...

Time is in seconds on any clock that does not go back. The rules are those of BEHAVIOUR
section 6; where one is quoted in a comment, the quote is from there.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from hydra_llm.simulation.catalog import GIB, MIB, SimulatedModel
from hydra_llm.simulation.memory import Need, Placement, need_of, place, reserve_of
from hydra_llm.simulation.records import (
    Event,
    Eviction,
    Failure,
    Job,
    LoadedRunner,
    LoadRecord,
    Options,
    Prompt,
    Ticket,
)
from hydra_llm.simulation.runner import Runner, Slot, Work, slots_for, sort_key
from hydra_llm.simulation.settings import NodeSettings

__all__ = ["BUSY", "OllamaServer"]

BUSY = Failure(
    503, "server busy, please try again.  maximum pending requests exceeded", cause="busy"
)

# Of each GPU's free memory, what a forecast may take beside loaded models (0.30 and later).
_SHARE_OF_FREE = 0.8
# How long a load runs before it dies for want of memory: measured 1.0 s.
_CRASH_S = 0.5


@dataclass(slots=True)
class _Load:
    """The one load that is going on."""

    ticket: Ticket
    runner: Runner
    started: float
    ends_at: float
    has_room: bool


class OllamaServer:
    """
    Everything that changes in one Ollama server, driven from outside.

    Nothing happens by itself: `submit`, `cancel` and `unload` say what is asked, and
    `advance` lets time pass. Between two events all rates are constant, so a caller may
    jump from one `next_event_at` to the next.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.loads: list[LoadRecord] = []
        self.evictions: list[Eviction] = []
        self.peak_vram_bytes = 0
        self._now = -math.inf
        self._ids = itertools.count(1)
        self._runners: dict[str, Runner] = {}
        self._queue: deque[Ticket] = deque()
        self._head: Ticket | None = None
        """The request the scheduler is working on; all others in the queue wait behind it."""
        self._leaving: Runner | None = None
        """The runner whose end the head waits for."""
        self._leaving_for: Literal["reload", "room", "memory"] = "room"
        self._room_at = -math.inf
        """When VRAM of an unloaded runner is back."""
        self._load: _Load | None = None
        self._retried: set[int] = set()
        self._slow = 1.0
        self._events: list[Event] = []

    def __repr__(self) -> str:
        names = ", ".join(runner.model.name for runner in self._runners.values()) or "nothing"
        return f"<OllamaServer {self.settings.version} [{names} loaded | {self.queued} queued]>"

    # ------------------------------------------------------------------ what is asked

    def submit(self, job: Job, now: float) -> Ticket:
        """Take a request; a full queue answers with a failed ticket at once."""
        self._until(now)
        ticket = Ticket(next(self._ids), job, now)
        runner = self._runners.get(job.model.weights_digest)
        if runner is not None and not runner.needs_reload(job.options):
            self._hand_over(ticket, runner)
        elif len(self._queue) >= self.settings.max_queue:
            self._fail(ticket, BUSY)
        else:
            self._queue.append(ticket)
            self._schedule()
        return ticket

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Say that the client has left: its slot is free, its load is aborted."""
        self._until(now)
        if ticket.is_over:
            return
        was, ticket.state, ticket.ended_at = ticket.state, "cancelled", now
        if was in {"waiting", "prefill", "decode"}:
            self._leave_runner(ticket)
        elif self._load is not None and self._load.ticket is ticket:
            self._end_load(self._load)
        elif ticket is not self._head:
            self._queue.remove(ticket)
        # A head that waits for a runner to end stays: the runner goes all the same.
        self._schedule()

    def unload(self, model: SimulatedModel, now: float) -> None:
        """Let a model go as soon as it is idle."""
        self._until(now)
        runner = self._runners.get(model.weights_digest)
        if runner is not None:
            runner.keep_alive = 0.0
            if runner.refs == 0:
                self._remove(runner, "asked")

    def preload(
        self,
        model: SimulatedModel,
        now: float,
        *,
        num_ctx: int | None = None,
        keep_alive: float | None = None,
    ) -> None:
        """Have a model loaded, with whatever is evicted for it, in no time."""
        self._until(now)
        old = self._runners.pop(model.weights_digest, None)
        if old is not None and old.refs:
            self._runners[old.key] = old
            raise RuntimeError(f"{model.name} is busy")
        options = Options(num_ctx=num_ctx)
        while True:
            found = self._find_place(model, options)
            if len(self._runners) < self.settings.loaded_limit and found is not None:
                break
            victim = self._pick_victim()
            if victim is None or victim.refs:
                raise RuntimeError(f"no room for {model.name}")
            self._remove(victim, "room")
        need, placement, num_ctx_used = found
        runner = self._new_runner(model, options, need, placement, num_ctx_used)
        runner.keep_alive = self.settings.keep_alive_s if keep_alive is None else keep_alive
        self._runners[runner.key] = runner
        self._note_peak()
        self._start_expiry(runner)

    def kill_runner(self, model: SimulatedModel, now: float) -> None:
        """End a runner process from outside, as the kernel does when memory is short."""
        self._until(now)
        modern, load = self.settings.is_modern, self._load
        if load is not None and load.runner.key == model.weights_digest:
            text = (
                "llama-server process has terminated: signal: killed"
                if modern
                else "llama runner process has terminated with exit code -1"
            )
            self._end_load(load)
            self._fail(load.ticket, Failure(500, text, "load killed"))
            self._schedule()
            return
        runner = self._runners.get(model.weights_digest)
        if runner is None:
            return
        runner.is_dead = True
        tickets = [work.ticket for work in runner.active] + list(runner.waiting)
        for ticket in tickets:
            eof = "an error was encountered while running the model: unexpected EOF"
            stopped = (
                "model runner has unexpectedly stopped, this may be due to resource limitations "
                "or an internal error, check ollama server logs for details"
            )
            before_first = ticket.job.each_token and ticket.tokens_out == 0
            text = stopped if before_first and not modern else eof
            self._leave_runner(ticket)
            self._fail(ticket, Failure(500, text, "runner killed"))
        self._schedule()

    def slow_down(self, factor: float, now: float) -> None:
        """Make everything computed from now on take ``factor`` times as long."""
        self._until(now)
        self._slow = factor
        self._set_rates()

    # ------------------------------------------------------------------ time

    def next_event_at(self) -> float | None:
        """When something will happen by itself; ``None`` when nothing will."""
        times = [work.ends_at() for runner in self._runners.values() for work in runner.active]
        times += [
            runner.expires_at
            for runner in self._runners.values()
            if runner.refs == 0 and runner.expires_at is not None
        ]
        if self._load is not None:
            times.append(self._load.ends_at)
        elif self._is_waiting_for_room():
            times.append(self._room_at)
        return max(self._now, min(times)) if times else None

    def advance(self, now: float) -> list[Event]:
        """Let time pass and say what happened since the last call."""
        self._until(now)
        events, self._events = self._events, []
        return events

    def _until(self, now: float) -> None:
        while (at := self.next_event_at()) is not None and at <= now:
            self._now = at
            self._happen(at)
        self._now = max(self._now, now)

    def _happen(self, at: float) -> None:
        """Do what is due at exactly ``at``."""
        for runner in list(self._runners.values()):
            for slot in runner.slots:
                if slot.work is not None and slot.work.ends_at() <= at:
                    self._reached(runner, slot, slot.work)
            if self._is_idle(runner) and runner.expires_at is not None and runner.expires_at <= at:
                self._remove(runner, "expired")
        if self._load is not None and self._load.ends_at <= at:
            self._loaded(self._load)
        self._schedule()

    # ------------------------------------------------------------------ what is so

    @property
    def queued(self) -> int:
        """Requests that wait for a load, the one being worked on included."""
        return len(self._queue) + (self._head is not None)

    @property
    def in_flight(self) -> int:
        """Requests that are not over."""
        return self.queued + sum(runner.refs for runner in self._runners.values())

    @property
    def vram_used_bytes(self) -> int:
        """What runners hold of the GPUs, a loading one included."""
        return sum(runner.placement.vram_bytes for runner in self._all_runners())

    def free_vram(self) -> tuple[int, ...]:
        """What is free on each GPU."""
        return tuple(
            gpu.total_bytes
            - gpu.used_by_others_bytes
            - sum(runner.placement.gpu_bytes[index] for runner in self._all_runners())
            for index, gpu in enumerate(self.settings.gpus)
        )

    def free_ram(self) -> int:
        """What system memory could still take."""
        used = sum(runner.placement.cpu_bytes for runner in self._all_runners())
        return self.settings.ram_bytes - used

    def would_load(self, model: SimulatedModel, options: Options) -> bool:
        """Whether a request would have to wait for a load or a reload."""
        runner = self._runners.get(model.weights_digest)
        return runner is None or runner.needs_reload(options)

    def running(self, now: float) -> list[LoadedRunner]:
        """List what ``/api/ps`` lists: ready runners, the latest expiry first."""
        self._until(now)
        listed = [
            LoadedRunner(
                model=runner.model,
                size=runner.need.total,
                size_vram=runner.placement.vram_bytes,
                context_length=runner.num_ctx,
                expires_at=self._shown_expiry(runner),
                keep_alive=runner.keep_alive,
                in_flight=runner.refs,
            )
            for runner in self._runners.values()
        ]
        return sorted(listed, key=lambda r: -(math.inf if r.expires_at is None else r.expires_at))

    def _shown_expiry(self, runner: Runner) -> float | None:
        if runner.keep_alive < 0:
            return None
        # Not set before the model was idle for the first time; ps works one out.
        return self._now + runner.keep_alive if runner.expires_at is None else runner.expires_at

    # ------------------------------------------------------------------ the scheduler

    def _schedule(self) -> None:
        """Work on the queue's head until it is handed over, loading, or waiting."""
        while self._load is None and self._leaving is None:
            if self._head is None:
                if not self._queue:
                    return
                self._head = self._queue.popleft()
            head = self._head
            if head.is_over:
                self._head = None
                continue
            if self._now < self._room_at:
                return
            runner = self._runners.get(head.job.model.weights_digest)
            if runner is not None and not runner.needs_reload(head.job.options):
                self._head = None
                self._hand_over(head, runner)
                continue
            victim, reason = self._make_way(head, runner)
            if victim is not None:
                self._evict(victim, reason)

    def _make_way(
        self, head: Ticket, runner: Runner | None
    ) -> tuple[Runner | None, Literal["reload", "room", "memory"]]:
        """Name the runner that must go for ``head``, or start its load."""
        if runner is not None:
            return runner, "reload"
        if len(self._runners) >= self.settings.loaded_limit:
            return self._pick_victim(), "room"
        if head.id in self._retried and self._runners:
            return self._pick_victim(), "memory"
        share = head.job.trouble.gpu_share
        found = self._find_place(head.job.model, head.job.options, gpu_share=share)
        if found is None:
            return self._pick_victim(), "room"
        self._start_load(head, *found)
        return None, "room"

    def _evict(self, victim: Runner, reason: Literal["reload", "room", "memory"]) -> None:
        victim.keep_alive = 0.0
        if victim.refs:
            self._leaving, self._leaving_for = victim, reason
            return
        self._remove(victim, reason)
        if victim.placement.vram_bytes:
            self._room_at = self._now + self.settings.vram_recovery_s

    def _pick_victim(self) -> Runner | None:
        return min(self._runners.values(), key=sort_key, default=None)

    def _find_place(
        self, model: SimulatedModel, options: Options, *, gpu_share: float = 1.0
    ) -> tuple[Need, Placement, int] | None:
        """Find where a runner would go; ``None`` when others have to leave first."""
        node, train = self.settings, model.context_length
        asked = options.num_ctx or node.automatic_num_ctx(train)
        num_ctx = min(asked, train)
        need = need_of(
            model,
            num_ctx=num_ctx,
            num_batch=options.num_batch,
            slots=slots_for(model, node),
            on=node,
        )
        free = self.free_vram()
        if not node.is_modern:
            reserve = reserve_of(need, layers=model.block_count)
            free = tuple(max(0, one - reserve) for one in free)
        num_gpu, layers = options.num_gpu, model.block_count
        room = place(need, free=free, layers=layers, num_gpu=num_gpu)
        if gpu_share < 1.0:
            num_gpu = int(gpu_share * room.gpu_share * (layers + 1))
            room = place(need, free=free, layers=layers, num_gpu=num_gpu)
        if self._runners and num_gpu != 0 and not self._fits_beside(need, free, room):
            return None
        return need, room, num_ctx

    def _fits_beside(self, need: Need, free: tuple[int, ...], room: Placement) -> bool:
        """Whether a runner may be loaded without unloading others."""
        if self.settings.is_modern:
            # "On CPU-only nodes 0.30 and later make no memory check at all."
            return not free or need.forecast <= _SHARE_OF_FREE * sum(free)
        if not free:
            return need.total <= self.free_ram()
        return room.cpu_bytes == 0

    # ------------------------------------------------------------------ loading

    def _start_load(self, head: Ticket, need: Need, room: Placement, num_ctx: int) -> None:
        has_room = room.cpu_bytes <= self.free_ram() and not head.job.trouble.fails
        if not has_room and not self.settings.is_modern:
            # Known before anything is loaded: the layout does not work out.
            self._head = None
            self._fail(head, self._no_memory(head, need, room))
            return
        model, node = head.job.model, self.settings
        if not has_room:
            room = replace(room, gpu_bytes=tuple(0 for _ in room.gpu_bytes), cpu_bytes=0)
        runner = self._new_runner(model, head.job.options, need, room, num_ctx)
        seconds = node.load_fixed_s + model.size_bytes / node.load_bandwidth * self._slow
        if not has_room:
            seconds = node.load_fixed_s + _CRASH_S
        head.state = "loading"
        self._load = _Load(head, runner, self._now, self._now + seconds, has_room)
        self._note_peak()
        self._events.append(Event(self._now, "load started", model.name, head))

    def _loaded(self, load: _Load) -> None:
        self._end_load(load)
        if not load.has_room:
            if self._runners and load.ticket.id not in self._retried:
                # "if the load crashes with an out-of-memory text, evict all other models
                # for one retry"
                self._retried.add(load.ticket.id)
                self._head = load.ticket
                load.ticket.state = "queued"
                return
            runner = load.runner
            self._fail(load.ticket, self._no_memory(load.ticket, runner.need, runner.placement))
            return
        self._runners[load.runner.key] = load.runner
        self._hand_over(load.ticket, load.runner)

    def _end_load(self, load: _Load) -> None:
        self._load = None
        self._head = None
        name = load.runner.model.name
        self.loads.append(LoadRecord(name, load.started, self._now))
        self._events.append(Event(self._now, "load ended", name, load.ticket))

    def _no_memory(self, ticket: Ticket, need: Need, room: Placement) -> Failure:
        if ticket.job.trouble.text is not None:
            return Failure(500, ticket.job.trouble.text, "memory")
        if not self.settings.is_modern:
            wanted = max(need.kv, room.cpu_bytes) if need.kv < need.weights else need.kv
            free = self.free_ram()
            if ticket.job.trouble.fails:
                wanted, free = need.total, min(free, need.total // 2)
            text = (
                f"model requires more system memory ({wanted / GIB:.1f} GiB) than is "
                f"available ({free / GIB:.1f} GiB)"
            )
            return Failure(500, text, "memory")
        what = need.kv if need.kv > need.weights else need.weights
        step = (
            "llama_init_from_model: failed to initialize the context: "
            "failed to allocate buffer for kv cache"
            if need.kv > need.weights
            else "llama_model_load_from_file_impl: failed to load model"
        )
        text = (
            "llama-server process has terminated: exit status 1: ggml_aligned_malloc: "
            f"insufficient memory (attempted to allocate {what / MIB:.2f} MB)\n"
            "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size "
            f"{what}\nalloc_tensor_range: failed to allocate CPU buffer of size {what}\n{step}"
        )
        return Failure(500, text, "memory")

    def _new_runner(
        self,
        model: SimulatedModel,
        options: Options,
        need: Need,
        placement: Placement,
        num_ctx: int,
    ) -> Runner:
        return Runner(
            model=model,
            node=self.settings,
            options=options,
            num_ctx=num_ctx,
            need=need,
            placement=placement,
            keep_alive=self.settings.keep_alive_s,
            slots=[Slot() for _ in range(slots_for(model, self.settings))],
        )

    # ------------------------------------------------------------------ runners

    def _hand_over(self, ticket: Ticket, runner: Runner) -> None:
        """Give a request to a runner that can serve it."""
        if ticket.job.keep_alive is not None:
            # Sticky, and it also takes back the mark of a runner that was to go: the wedge
            # of ollama issue 17408.
            runner.keep_alive = ticket.job.keep_alive
        ticket.handed_at, ticket.state = self._now, "waiting"
        runner.refs += 1
        if ticket.job.kind == "load":
            ticket.started_at = ticket.decoding_at = self._now
            self._leave_runner(ticket)
            self._finish(ticket)
            return
        runner.waiting.append(ticket)
        self._fill_slots(runner)

    def _fill_slots(self, runner: Runner) -> None:
        while runner.waiting:
            slot = runner.free_slot_for(runner.waiting[0].job)
            if slot is None:
                break
            ticket = runner.waiting.popleft()
            ticket.state, ticket.started_at = "prefill", self._now
            ticket.cached_tokens = runner.cached_tokens(slot, ticket.job)
            tokens = ticket.job.prompt_tokens - ticket.cached_tokens
            runner.remember(slot, ())
            slot.work = Work(ticket, tokens * runner.prompt_token_s, self._now)
        self._set_rates()

    def _reached(self, runner: Runner, slot: Slot, work: Work) -> None:
        """Take a piece of work one step on: prompt read, a token out, or all done."""
        ticket, job = work.ticket, work.ticket.job
        if ticket.state == "prefill":
            ticket.state, ticket.decoding_at = "decode", self._now
            slot.cached = job.prompt
        else:
            step = self._step(ticket)
            if job.each_token:
                index = ticket.tokens_out
                event = Event(self._now, "token", job.model.name, ticket, index, step)
                self._events.append(event)
            ticket.tokens_out += step
        if ticket.tokens_out < job.answer_tokens and job.kind == "generate":
            work.left_s, work.since = self._step(ticket) * runner.token_s, self._now
            return
        ticket.ended_at = self._now
        slot.cached = _whole(job)
        self._leave_runner(ticket)
        self._finish(ticket)

    def _step(self, ticket: Ticket) -> int:
        """How many tokens come next at one time."""
        job = ticket.job
        if not job.each_token:
            return job.answer_tokens
        # The first one comes alone: its time is what people look at.
        most = self.settings.tokens_per_part if ticket.tokens_out else 1
        return min(most, job.answer_tokens - ticket.tokens_out)

    def _leave_runner(self, ticket: Ticket) -> None:
        """Free the slot, serve the next, and let the runner go if it is to go."""
        runner = self._runners[ticket.job.model.weights_digest]
        runner.refs -= 1
        for slot in runner.slots:
            if slot.work is not None and slot.work.ticket is ticket:
                slot.work = None
        if ticket in runner.waiting:
            runner.waiting.remove(ticket)
        if not runner.is_dead:
            self._fill_slots(runner)
        if runner.refs == 0:
            if runner.keep_alive == 0:
                self._remove(runner, self._leaving_for if runner is self._leaving else "asked")
            else:
                self._start_expiry(runner)

    def _is_idle(self, runner: Runner) -> bool:
        """Whether it is still there and serves nobody."""
        return runner.refs == 0 and self._runners.get(runner.key) is runner

    def _start_expiry(self, runner: Runner) -> None:
        forever = runner.keep_alive < 0
        runner.expires_at = None if forever else self._now + runner.keep_alive

    def _remove(
        self, runner: Runner, reason: Literal["expired", "room", "reload", "asked", "memory"]
    ) -> None:
        del self._runners[runner.key]
        # The scheduler waits for any runner to end, not for this one, and looks again.
        self._leaving = None
        self.evictions.append(Eviction(runner.model.name, self._now, reason))
        self._events.append(Event(self._now, "unloaded", runner.model.name))
        if self._head is not None and runner.placement.vram_bytes:
            self._room_at = self._now + self.settings.vram_recovery_s
        self._set_rates()

    def _set_rates(self) -> None:
        """Share the devices among all that computes."""
        busy = [runner for runner in self._runners.values() if runner.active]
        for runner in busy:
            others = sum(
                len(other.active)
                for other in busy
                if other is not runner and other.devices & runner.devices
            )
            factor = runner.slowdown(others) * self._slow
            for work in runner.active:
                if work.slowdown != factor:
                    work.progress(self._now)
                    work.slowdown = factor

    def _all_runners(self) -> list[Runner]:
        loading = [self._load.runner] if self._load is not None else []
        return [*self._runners.values(), *loading]

    def _is_waiting_for_room(self) -> bool:
        return self._head is not None and self._leaving is None and self._room_at > self._now

    def _note_peak(self) -> None:
        self.peak_vram_bytes = max(self.peak_vram_bytes, self.vram_used_bytes)

    # ------------------------------------------------------------------ endings

    def _finish(self, ticket: Ticket) -> None:
        ticket.state, ticket.ended_at = "done", self._now
        self._events.append(Event(self._now, "done", ticket.job.model.name, ticket))

    def _fail(self, ticket: Ticket, failure: Failure) -> None:
        ticket.state, ticket.ended_at, ticket.failure = "failed", self._now, failure
        self._events.append(Event(self._now, "failed", ticket.job.model.name, ticket))


def _whole(job: Job) -> Prompt:
    return job.prompt + job.answer
